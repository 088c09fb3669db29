"""dsmoe::experts_training on a GPU: the routed experts by sorted rows, whose up kernel also writes joint.

T tokens, H hidden size, E experts, I expert width, K experts per token, P = T K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe_runtime.kernels.dispatch import Rows, plan_rows
from dsmoe_runtime.kernels.experts import Weights, combine_answers, down_sorted, plan_for, up_sorted
from dsmoe_runtime.kernels.plan import Plan, Tile

HALF = Plan("sorted", Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4), half=True)
FLOAT = Plan("sorted", Tile(32, 32, 32, 4, 2), Tile(32, 64, 32, 4, 2))
TALL = 64  # rows of a tile, from which on tensor cores run at full rate


def experts_training(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y `[T, H]`, joint `[P, 2I]`, slots `[P]` and offsets `[E + 1]`; see `ops.experts_training`."""
    w = Weights.of(gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    activated, joint, rows = keep(x, experts, w)
    offsets = rows.offsets[: gate_up.shape[0] + 1].clone()  # results of an operator share no memory
    if len(x) > 0:
        answers = down_sorted(activated, rows, w, plan_training(x, experts.shape[1], w))
        combine_answers(answers, experts.contiguous(), weights.contiguous(), y, w)
    return y, joint, rows.slots, offsets


def keep(x: Tensor, experts: Tensor, w: Weights) -> tuple[Tensor, Tensor, Rows]:
    """hidden `[P, I]` and joint `[P, 2I]`, ungated `[P, I]`, in the order of rows, and the rows."""
    plan, experts = plan_training(x, experts.shape[1], w), experts.contiguous()
    rows = plan_rows(experts, w.gate_up.shape[0], plan.up.block_m)
    if experts.numel() == 0:
        return x.new_empty((0, w.width)), x.new_empty((0, w.gate_up.shape[1])), rows
    hidden, joint = up_sorted(
        x if x.stride(1) == 1 else x.contiguous(), rows, experts.shape[1], w, plan, save_joint=True
    )
    assert joint is not None
    return hidden, joint, rows


def plan_training(x: Tensor, top_k: int, w: Weights) -> Plan:
    """The forward's plan where it is one for many tokens, which training is for; else one cut, whatever the shape."""
    plan = plan_for(x, top_k, w)
    if plan.regime == "sorted" and plan.up.block_m >= TALL:
        return plan
    return FLOAT if x.dtype == torch.float32 else HALF
