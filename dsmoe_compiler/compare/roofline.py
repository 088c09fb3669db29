"""The roofline: the least time a phase could take on this machine, from bytes and operations that really had to happen.

Bytes: the weights of the experts that were hit (each once per layer, however many tokens chose it), every other weight
once, the cache up to the position, embedding rows, activations in and out of each layer. Operations: 2 per weight and
token, attention, and logits of the last position only. Bandwidth and GEMM rate are measured in the same run, not taken
from a data sheet; a model that fits into the last-level cache can therefore exceed 100 %.

T tokens of all sequences, H model width, I expert width, B sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dsmoe_compiler.compare.timing import stopwatch
from dsmoe_model.mlp import MLP
from dsmoe_model.transformer import Block, Transformer


@dataclass(frozen=True, kw_only=True)
class Roof:
    """What this machine reaches: bytes/s of a large read or copy, whichever is faster, and FLOP/s of a square GEMM."""

    bytes_per_second: float
    flops_per_second: float
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one call has to do at least, and the seconds that the roof allows for it."""

    bytes: int
    flops: int
    seconds: float
    bound: str  # "memory" | "compute"


def measure_roof(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.4) -> Roof:
    """Best of as many repeats as fit into `seconds` for each of read, copy and GEMM (256 MB and 1024^3 on the CPU)."""
    cuda = device.type == "cuda"
    n_bytes, side = (2**32, 8192) if cuda else (2**28, 1024)
    source = torch.ones(n_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a_MM, b_MM = (torch.randn(side, side, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    out_MM = torch.empty_like(a_MM)

    def best(call: Callable[[], object]) -> float:
        call()
        stop, fastest = time.perf_counter() + seconds, float("inf")
        while time.perf_counter() < stop:
            fastest = min(fastest, stopwatch(call, device))
        return fastest if fastest < float("inf") else stopwatch(call, device)

    read = n_bytes / best(source.sum)
    copy = 2 * n_bytes / best(lambda: target.copy_(source))
    gemm = 2 * side**3 / best(lambda: torch.mm(a_MM, b_MM, out=out_MM))
    return Roof(bytes_per_second=max(read, copy), flops_per_second=gemm, dtype=str(dtype).removeprefix("torch."))


def phase_work(
    model: Transformer, roof: Roof, *, batch: int, tokens: int, context: int, distinct: tuple[int, ...]
) -> Work:
    """Work of one call on `tokens` new tokens per sequence; the last of them sees `context` positions, itself included.

    `distinct` holds the number of different experts hit in each layer with routed experts, in order.
    """
    config, size = model.config, model.norm.weight.element_size()
    n_tokens, hidden = batch * tokens, config.hidden_size
    bytes_, flops = n_tokens * hidden * size, 0  # embedding rows
    remaining = list(distinct)
    cached = 2 * config.num_key_value_heads * config.head_dim * size
    seen = batch * sum(range(context - tokens + 1, context + 1))  # positions attended to, over all new tokens
    for layer in model.layers:
        assert isinstance(layer, Block)
        attention = _weights(layer.self_attn.parameters())
        bytes_ += attention * size + batch * context * cached + 4 * n_tokens * hidden * size
        flops += 2 * n_tokens * attention + 4 * config.num_attention_heads * config.head_dim * seen
        if isinstance(layer.mlp, MLP):
            dense, expert_weights, hit = _weights(layer.mlp.parameters()), 0, 0
        else:
            experts = _weights(layer.mlp.experts.parameters()) if layer.mlp.experts is not None else 0
            dense = _weights(layer.mlp.parameters()) - experts
            hit = remaining.pop(0) if experts else 0
            expert_weights = experts // config.n_routed_experts if experts else 0
        bytes_ += (dense + hit * expert_weights) * size
        flops += 2 * n_tokens * (dense + config.num_experts_per_tok * expert_weights)
    if remaining:
        raise ValueError(f"distinct counts {len(distinct)} layers, the model has {len(distinct) - len(remaining)}")
    head = model.lm_head.weight.numel()
    bytes_ += head * size + batch * config.vocab_size * size
    flops += 2 * batch * head
    memory, compute = bytes_ / roof.bytes_per_second, flops / roof.flops_per_second
    bound = "memory" if memory >= compute else "compute"
    return Work(bytes=bytes_, flops=flops, seconds=max(memory, compute), bound=bound)


def _weights(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
