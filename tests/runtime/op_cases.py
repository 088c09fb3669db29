"""Layers and inputs for the tests of the operators, at a scale at which outputs are about 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dsmoe_runtime.ops  # noqa: F401  (registers them)
from dsmoe_model.config import ModelConfig
from dsmoe_model.moe import MoE

LAYOUTS = ("concat", "interleaved", "concat_transposed", "interleaved_transposed")
ACTIVATIONS = ("silu", "silu_clamped", "swiglu_oai")  # those of the oracle
# (activation, layout): the oracle's with each layout, the others and experts without a gate once or twice each
COMBINATIONS = [
    *((activation, layout) for activation in ACTIVATIONS for layout in LAYOUTS),
    ("gelu", "concat"), ("gelu_tanh", "concat"), ("relu", "concat_transposed"), ("relu2", "interleaved"),
    ("gelu_tanh", "interleaved_transposed"),
    ("silu", "ungated_transposed"), ("gelu", "ungated"), ("gelu_tanh", "ungated_transposed"),
    ("relu", "ungated"), ("relu2", "ungated"), ("relu2", "ungated_transposed"),
]  # fmt: skip
ALPHA, LIMIT = 1.702, 0.9  # a limit that cuts

GATES: dict[str, dict[str, Any]] = {
    "v1": {},
    "v1 renormalised": {"norm_topk_prob": True},
    "v1 in the activations' dtype": {"router_dtype": "activation"},
    "V2": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    "V3": {
        "scoring_func": "sigmoid",
        "selection_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "group_score": "top2",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "V4": {
        "scoring_func": "sqrtsoftplus",
        "selection_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    },
    "gpt-oss": {"scoring_func": "softmax_after_topk"},
}


def small_config(**changes: Any) -> ModelConfig:
    """Twelve experts, three a token, two shared; odd widths."""
    values: dict[str, Any] = {
        "vocab_size": 16,
        "hidden_size": 42,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "intermediate_size": 8,
        "max_position_embeddings": 8,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 27,
        "swiglu_alpha": ALPHA,
        "swiglu_limit": LIMIT,
    }
    return ModelConfig(**(values | changes))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal, drawn in float64 and rounded to `dtype`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weight(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal, scaled so that a product with unit inputs is about 1."""
    return (normal(*shape, seed=seed, dtype=torch.float64) * shape[-1] ** -0.5).to(dtype)


def layer_of(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> MoE:
    """The oracle's layer with weights at a sane scale, rounded to `dtype`; routed logits about 1, so gates differ."""
    layer = MoE(config).to(dtype).eval()
    for index, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(weight(*parameter.shape, seed=100 * seed + index, dtype=torch.float64))
    if layer.router.e_score_correction_bias is not None:
        bias = 0.1 * normal(config.n_routed_experts, seed=100 * seed + 99)
        layer.router.e_score_correction_bias.copy_(bias)
    return layer


def in_layout(gate_up: Tensor, down: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The same experts, given as "concat", in another layout; ungated: those that have the gates alone."""
    if layout.startswith("interleaved"):
        gate_up = torch.stack(gate_up.chunk(2, dim=1), dim=2).flatten(1, 2)
    elif layout.startswith("ungated"):
        gate_up = gate_up[:, : gate_up.shape[1] // 2].contiguous()
    if layout.endswith("_transposed"):
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    return gate_up, down


def moe_arguments(layer: MoE, layout: str = "concat") -> tuple[Any, ...]:
    """What torch.ops.dsmoe.moe takes after x, for the oracle's layer."""
    c = layer.router.config
    gate_up, down = in_layout(layer.experts.gate_up_proj, layer.experts.down_proj, layout)
    shared = (None, None)
    if layer.shared_experts is not None:
        mlp = layer.shared_experts
        shared = (torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), mlp.down_proj.weight)
    gate = (c.scoring_func, c.n_group, c.topk_group, c.group_score, c.norm_topk_prob, c.norm_eps)
    return (
        *(layer.router.weight, None, layer.router.e_score_correction_bias, c.num_experts_per_tok),
        *(*gate, c.routed_scaling_factor, c.router_dtype),
        *(gate_up, down, None, None, c.hidden_act, c.swiglu_alpha, c.swiglu_limit, layout),
        *(*shared, None),
    )


def slot_by_slot(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    layout: str = "concat",
) -> Tensor:
    """dsmoe::experts written as naively as can be, for weights in "concat", in x's dtype: one slot after the other.

    An ungated layout: the gates alone.
    """
    functions = {
        "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
        "relu": F.relu, "relu2": lambda g: F.relu(g) * F.relu(g),
    }  # fmt: skip
    rows = []
    for x_H, ids_K, weights_K in zip(x, experts.tolist(), weights, strict=True):
        y_H = torch.zeros_like(x_H)
        for expert, w in zip(ids_K, weights_K, strict=True):
            if not 0 <= expert < gate_up.shape[0]:
                continue
            joint = gate_up[expert] @ x_H + (0 if gate_up_bias is None else gate_up_bias[expert])
            gate, up = joint.chunk(2)
            if activation in ("silu", *functions):
                up = torch.ones_like(up) if layout.startswith("ungated") else up
                hidden = (functions[activation](gate) if activation != "silu" else gate * torch.sigmoid(gate)) * up
            else:
                gate, up = torch.minimum(gate, gate.new_tensor(LIMIT)), torch.clip(up, -LIMIT, LIMIT)
                oai = activation == "swiglu_oai"
                hidden = gate * torch.sigmoid((ALPHA if oai else 1.0) * gate) * (up + (1.0 if oai else 0.0))
            y_H = y_H + w.to(x.dtype) * (down[expert] @ hidden + (0 if down_bias is None else down_bias[expert]))
        rows.append(y_H)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def expert_case(
    tokens: int = 7,
    *,
    hidden: int = 42,
    width: int = 27,
    num_experts: int = 12,
    top_k: int = 3,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `slot_by_slot` but the activation, by name, with distinct experts per token."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k].contiguous()
    return {
        "x": normal(tokens, hidden, seed=seed + 1, dtype=dtype),
        "experts": experts,
        "weights": torch.rand(tokens, top_k, generator=generator) + 0.1,
        "gate_up": weight(num_experts, 2 * width, hidden, seed=seed + 2, dtype=dtype),
        "down": weight(num_experts, hidden, width, seed=seed + 3, dtype=dtype),
        "gate_up_bias": normal(num_experts, 2 * width, seed=seed + 4, dtype=dtype) if bias else None,
        "down_bias": normal(num_experts, hidden, seed=seed + 5, dtype=dtype) if bias else None,
    }


def laid_out(case: dict[str, Any], layout: str) -> dict[str, Any]:
    """The same case with its weights, "concat" so far, in another layout."""
    gate_up, down = in_layout(case["gate_up"], case["down"], layout)
    bias = case["gate_up_bias"]
    if bias is not None and layout.startswith("interleaved"):
        bias = torch.stack(bias.chunk(2, dim=1), dim=2).flatten(1)
    elif bias is not None and layout.startswith("ungated"):
        bias = bias.chunk(2, dim=1)[0].contiguous()
    return case | {"gate_up": gate_up, "down": down, "gate_up_bias": bias}


def run(case: dict[str, Any], activation: str = "silu", layout: str = "concat") -> Tensor:
    """torch.ops.dsmoe.experts on a case that is in `layout`."""
    return torch.ops.dsmoe.experts(**case, **attributes(activation, layout))


def attributes(activation: str = "silu", layout: str = "concat") -> dict[str, Any]:
    return {"activation": activation, "alpha": ALPHA, "limit": LIMIT, "layout": layout}


def exact(case: dict[str, Any]) -> dict[str, Any]:
    """The same case in float64."""
    return {
        name: value.double() if value is not None and value.is_floating_point() else value
        for name, value in case.items()
    }
