"""Parameters and training FLOPs: counted on the real module, and as the paper counts, with what the paper prints.

FLOPs of one step over a sequence of T tokens, forward and backward, reproduce the paper's column as

    6 N T + 12 L (A D) T^2 + 6 V H T

N activated parameters of attention and feed-forward, L layers, A D width of all heads, V vocabulary, H model width:
two FLOPs a multiply-add, three passes, attention without the causal half, the head but not the input embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsmoe_model.config import ModelConfig
from dsmoe_model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Account:
    """Parameter counts of one model. `total` is the sum of the seven parts; buffers are not parameters."""

    embedding: int  # input embedding and head (once, when tied)
    attention: int
    dense: int  # dense feed-forwards
    routed_experts: int
    shared_experts: int
    router: int
    norm: int
    total: int
    activated: int  # all but the routed experts that one token does not reach

    @property
    def experts(self) -> int:
        """The paper's "# Total Expert Params": routed and shared."""
        return self.routed_experts + self.shared_experts

    @property
    def activated_experts(self) -> int:
        """The paper's "# Activated Expert Params"."""
        return self.experts - (self.total - self.activated)


def account(config: ModelConfig) -> Account:
    """Build the model on the meta device (nothing is allocated) and count its parameters by what they belong to."""
    parts = dict.fromkeys(("embedding", "attention", "dense", "routed_experts", "shared_experts", "router", "norm"), 0)
    with torch.device("meta"):
        model = Transformer(config)
    for name, parameter in model.named_parameters():
        parts[_part(name)] += parameter.numel()
    total = sum(parts.values())
    reached = parts["routed_experts"] * config.num_experts_per_tok // max(config.n_routed_experts, 1)
    return Account(**parts, total=total, activated=total - parts["routed_experts"] + reached)


def training_flops(config: ModelConfig, tokens: int) -> float:
    """Forward and backward FLOPs of one sequence of `tokens`, by the formula above, with the widths of the config."""
    counted = account(config)
    linear = counted.attention + counted.dense + counted.activated_experts
    return _flops(config, tokens, linear)


def paper_flops(config: ModelConfig, tokens: int) -> float:
    """The same as the paper counts it: 4 H^2 of attention whatever the grouping of keys and values, and the nominal
    width of a feed-forward where the built one is that width rounded up (`nominal_width`)."""
    hidden = config.hidden_size
    expert = nominal_width(config.moe_intermediate_size, hidden)
    dense = nominal_width(config.intermediate_size, hidden)
    active = config.n_shared_experts + config.num_experts_per_tok
    linear = 0.0
    for layer in range(config.num_hidden_layers):
        linear += 4 * hidden * config.num_attention_heads * config.head_dim
        linear += 3 * hidden * (expert * active if config.is_moe_layer(layer) else dense)
    return _flops(config, tokens, linear)


def nominal_width(width: int, hidden_size: int) -> float:
    """The width before rounding, r * 8H/3, when `width` is at most 3.2% above it for some multiple r of 1/4.

    The paper's column counts the 16B's experts as 0.25 * 8H/3 = 1365.3 and not the 1408 that was built, its first layer
    as 10922.7 and not 10944, DeepSeek 7B and LLaMA2 7B as 10922.7 and not 11008. The 145B's experts, an eighth, are
    the one case where it counts the rounded width.
    """
    standard = 8 * hidden_size / 3
    nominal = int(4 * (width + 1) / standard) / 4 * standard  # + 1: the validation models' widths are rounded down
    return nominal if nominal and -1 < width - nominal <= 0.032 * nominal else float(width)


def _flops(config: ModelConfig, tokens: int, linear: float) -> float:
    heads = config.num_attention_heads * config.head_dim
    head = config.vocab_size * config.hidden_size
    return 6 * tokens * (linear + head) + 12.0 * config.num_hidden_layers * heads * tokens**2


def _part(name: str) -> str:
    """Which part of the account a parameter's name belongs to."""
    if name.startswith(("embed_tokens", "lm_head")):
        return "embedding"
    if ".self_attn." in name:
        return "attention"
    if "norm" in name:
        return "norm"
    for part, marker in (
        ("router", ".router."),
        ("routed_experts", ".experts."),
        ("shared_experts", ".shared_experts."),
    ):
        if marker in name:
            return part
    return "dense"


@dataclass(frozen=True, kw_only=True)
class Printed:
    """What the paper prints about a system, digit for digit: parameters in B, training FLOPs in T per `tokens`."""

    tokens: int
    total: str | None = None
    activated: str | None = None
    experts: str | None = None
    activated_experts: str | None = None
    flops: str | None = None


PRINTED: dict[str, Printed] = {
    "deepseek-moe-2b": Printed(
        tokens=2048, total="2.0", activated="0.3", experts="1.89", activated_experts="0.24", flops="4.3"
    ),
    "gshard-2b": Printed(tokens=2048, total="2.0", activated="0.3", flops="4.3"),
    "gshard-x1.2": Printed(tokens=2048, experts="2.3", activated_experts="0.28"),
    "gshard-2.9b": Printed(tokens=2048, experts="2.83", activated_experts="0.35", flops="5.8"),
    "switch-2b": Printed(tokens=2048, total="2.0", activated="0.2", flops="2.9"),
    "hash-2b": Printed(tokens=2048, total="2.0", activated="0.2", flops="2.9"),
    "dense-0.2b": Printed(tokens=2048, total="0.2", activated="0.2", flops="2.9"),
    "dense-x4": Printed(tokens=2048, experts="0.47", activated_experts="0.47"),
    "dense-x16": Printed(tokens=2048, experts="1.89", activated_experts="1.89", flops="24.6"),
    "deepseek-moe-16b": Printed(tokens=4096, total="16.4", activated="2.8", flops="74.4"),
    "deepseek-7b": Printed(tokens=4096, total="6.9", activated="6.9", flops="183.5"),
    "llama2-7b": Printed(tokens=4096, total="6.7", activated="6.7", flops="187.9"),
    "deepseek-moe-145b": Printed(tokens=4096, total="144.6", activated="22.2", flops="585.6"),
    "deepseek-moe-142b-half": Printed(tokens=4096, total="142.3", activated="12.2", flops="374.6"),
    "gshard-137b": Printed(tokens=4096, total="136.5", activated="21.6", flops="572.7"),
    "deepseek-67b": Printed(tokens=4096, total="67.4", activated="67.4", flops="2057.5"),
}


def disagreements(name: str, config: ModelConfig) -> list[str]:
    """Where the paper's printed figures for preset `name` are not what arithmetic gives, one sentence each.

    One is large: the 142B-half's activated parameters, printed 12.2B, counted 13.6B (+11.6%). The others are in the
    last digit: its total (142.3B, counted 142.4B) and FLOPs (374.6T, 374.5T), the 145B's FLOPs (585.6T, 585.3T) and
    GShard 137B's activated parameters (21.6B, 21.7B). Every other figure comes out as printed.
    """
    if name not in PRINTED:
        return []
    printed, counted = PRINTED[name], account(config)
    flops = paper_flops(config, printed.tokens)
    figures = (
        ("total parameters", printed.total, counted.total / 1e9, "B"),
        ("activated parameters", printed.activated, counted.activated / 1e9, "B"),
        ("expert parameters", printed.experts, counted.experts / 1e9, "B"),
        ("activated expert parameters", printed.activated_experts, counted.activated_experts / 1e9, "B"),
        (f"FLOPs per {printed.tokens} tokens", printed.flops, flops / 1e12, "T"),
    )
    found = []
    for what, said, is_so, unit in figures:
        if said is None:
            continue
        digits = len(said.partition(".")[2])
        if f"{is_so:.{digits}f}" != said:
            off = is_so / float(said) - 1
            found.append(
                f"{what}: the paper prints {said}{unit}, arithmetic gives {is_so:.{digits}f}{unit} ({off:+.2%})"
            )
    return found
