"""dsmoe::moe on the CPU by our own kernels: gate, routed experts and shared experts, rounded once.

The shared experts are one expert that every token has, with weight 1, or the sigmoid of its gate (Qwen2-MoE); they run
through the same kernel as the routed ones. The router's logits, E numbers a token, are torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.experts import experts as run_experts
from dsmoe_runtime.mlir.levels import Level
from dsmoe_runtime.mlir.route import route
from dsmoe_runtime.ops.moe import moe_fake, router_logits, shared_layout


def moe(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    renormalize: bool,
    eps: float,
    scale: float,
    router_dtype: str,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    shared_gate: Tensor | None,
    *,
    level: Level | None = None,
) -> tuple[Tensor, Tensor]:
    """dsmoe::moe: `y [T, H]` and the `experts [T, K]` that made it, by the rule and arguments of ops/moe.py."""
    y, _ = moe_fake(
        x, router_weight, router_bias, selection_bias, top_k, score, n_group, topk_group, group_score, renormalize,
        eps, scale, router_dtype, gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout,
        shared_gate_up, shared_down, shared_gate,
    )  # fmt: skip
    if router_dtype == "activation" and x.dtype != torch.float32:
        raise TargetError(f"router_dtype is 'activation' and x {x.dtype}; the mlir-cpu gate computes in float32")
    bias = None if selection_bias is None else selection_bias.float()
    weights, ids = route(
        router_logits(x, router_weight, router_bias, "float32"), bias, top_k, score, n_group, topk_group, group_score,
        renormalize, eps, scale, level=level,
    )  # fmt: skip
    shared = shared_gate_up is not None and shared_down is not None
    answer = run_experts(
        x, ids, weights, gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout, level=level,
        dtype=torch.float32 if shared else None,
    )  # fmt: skip
    if shared_gate_up is None or shared_down is None:
        return answer, ids
    first = torch.zeros(len(x), 1, dtype=torch.int64)
    share = torch.ones(len(x), 1) if shared_gate is None else F.linear(x, shared_gate).float().sigmoid()
    answer += run_experts(
        x, first, share, shared_gate_up[None], shared_down[None], None, None, activation, alpha, limit,
        shared_layout(layout), level=level, dtype=torch.float32,
    )  # fmt: skip
    return y.copy_(answer), ids
