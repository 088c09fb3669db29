"""Routed experts as others spell them, and what agrees: stock grouped_mm, transformers, a loop on a sample of rows.

T tokens, H hidden size, E experts, I expert width, K experts per token, P = T K slots, R sampled rows.
All take `(x [T, H], ids [T, K], weights [T, K], gate_up [E, 2I, H], down [E, H, I])` and give `[T, H]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dsmoe_runtime.ops  # noqa: F401  registers the operators

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def dsmoe(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Ours."""
    return torch.ops.dsmoe.experts(x, ids, weights, gate_up, down, None, None, "silu", 1.0, 1.0, "concat")


def refusal(operator: str, *arguments: Any) -> str | None:
    """Why dsmoe::`operator` runs its plain-torch rule for these arguments on a GPU, or None: its kernels run."""
    from dsmoe_runtime.ops import cuda

    return cuda.why_not(operator, arguments)


def grouped_mm(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """torch alone: sort by expert, gather, two grouped products, back to the tokens' order, weighted sum over k."""
    slots, top_k = ids.numel(), ids.shape[1]
    sorted_P, order_P = ids.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(sorted_P, torch.arange(gate_up.shape[0], device=x.device), right=True, out_int32=True)
    joint = torch._grouped_mm(x.index_select(0, order_P // top_k), gate_up.mT, offs=ends_E)
    gate, up = joint.chunk(2, dim=-1)
    answers = torch._grouped_mm(F.silu(gate) * up, down.mT, offs=ends_E)
    place_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(slots, device=x.device))
    by_token = answers.index_select(0, place_P).view(-1, top_k, x.shape[1])
    return (by_token * weights[..., None]).sum(1).to(x.dtype)


def transformers_experts(implementation: str, num_experts: int, hidden: int, width: int) -> Experts:
    """transformers' own experts ("grouped_mm" or "batched_mm"), of Qwen3-MoE; DeepSeek's differ in the name alone."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(num_experts=num_experts, hidden_size=hidden, moe_intermediate_size=width)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: Any = Qwen3MoeExperts(config)

    def call(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"gate_up_proj": gate_up, "down_proj": down}, (x, ids, weights))

    return call


def expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert's answer to some rows, in their dtype."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def loop(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
    """The oracle's loop on a few rows in `dtype`: an expert's weights are cast when it is its turn."""
    wide = torch.promote_types(dtype, torch.float32)
    y = torch.zeros_like(x, dtype=wide)
    for number in ids.unique().tolist():
        rows, slots = torch.where(ids == number)
        answer = expert(x[rows].to(dtype), gate_up[number].to(dtype), down[number].to(dtype))
        y = y.index_add(0, rows, answer.to(wide) * weights[rows, slots, None].to(wide))
    return y.to(dtype)


def uniform(tokens: int, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """`[T, K]` distinct experts, all equally likely."""
    noise = torch.rand(tokens, num_experts, generator=generator, device=generator.device)
    return noise.topk(top_k, dim=-1).indices


def skewed(tokens: int, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """`[T, K]` distinct experts, the n-th of a random order 1 / n as likely as the first (Zipf, by Gumbel's trick)."""
    order = torch.randperm(num_experts, generator=generator, device=generator.device)
    noise = torch.rand(tokens, num_experts, generator=generator, device=generator.device)
    return ((order + 1.0).reciprocal().log() - (-noise.log()).log()).topk(top_k, dim=-1).indices


def same(tokens: int, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """`[T, K]`: all tokens on the same K experts."""
    return torch.randperm(num_experts, generator=generator, device=generator.device)[:top_k].expand(tokens, -1).clone()


ROUTINGS = {"uniform": uniform, "skewed": skewed, "same": same}


def routing_weights(ids: Tensor, generator: torch.Generator) -> Tensor:
    """`[T, K]` float32 with squares that sum to 1, so that an output is as large as an expert's answer."""
    noise = torch.rand(ids.shape, generator=generator, device=ids.device) + 0.5
    return noise / noise.norm(dim=-1, keepdim=True)


def weight_stacks(
    num_experts: int, hidden: int, width: int, *, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """gate_up and down at the scale at which an answer is about 1: E silu(g)^2 u^2 is 0.356 for normal g and u."""
    device = generator.device
    gate_up = torch.empty(num_experts, 2 * width, hidden, dtype=dtype, device=device)
    down = torch.empty(num_experts, hidden, width, dtype=dtype, device=device)
    gate_up.normal_(0.0, hidden**-0.5, generator=generator)
    down.normal_(0.0, (0.356 * width) ** -0.5, generator=generator)
    return gate_up, down
