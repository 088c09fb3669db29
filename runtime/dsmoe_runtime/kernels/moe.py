"""dsmoe::moe on a GPU: the gate, then the routed experts with the shared ones in the same launches or beside them.

T tokens, H hidden size, E experts, I expert width, S shared width, K experts per token.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from dsmoe_runtime.kernels.device.gated import gated
from dsmoe_runtime.kernels.device.one_expert import in_order
from dsmoe_runtime.kernels.dispatch import Rows, carved, most_tiles
from dsmoe_runtime.kernels.experts import Weights, down_sorted, plan_for, run, up_sorted
from dsmoe_runtime.kernels.launch import chained, launch
from dsmoe_runtime.kernels.plan import Plan
from dsmoe_runtime.kernels.route import gate


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
) -> tuple[Tensor, Tensor]:
    """`y [T, H]` and the `experts [T, K]` (int64) that made it; arguments as in `ops.moe`."""
    weights, experts = gate(
        x, router_weight, router_bias, selection_bias, top_k, score, n_group, topk_group, group_score, renormalize,
        eps, scale, router_dtype,
    )  # fmt: skip
    w = Weights.of(gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout)
    plan = plan_for(x, top_k, w)
    if shared_gate_up is None or shared_down is None:
        return run(x, experts, weights, w, plan), experts
    if plan.regime != "sorted" and shared_gate is None and sliceable(w, shared_down):
        return run(x, experts, weights, sliced(w, shared_gate_up, shared_down), plan), experts
    answer = shared_experts(x, shared_gate_up, shared_down, activation, alpha, limit)
    if shared_gate is not None:
        answer = answer * F.linear(x, shared_gate).sigmoid()
    return run(x, experts, weights, w, plan, extra=answer), experts


def sliceable(w: Weights, shared_down: Tensor) -> bool:
    """Whether the shared experts are a whole number of MLPs as wide as a routed expert, read the same way."""
    return (
        shared_down.shape[1] % w.width == 0 and w.gate_up.stride(2) == 1 and w.down.stride(2) == 1 and w.gate_step == 1
    )


def sliced(w: Weights, shared_gate_up: Tensor, shared_down: Tensor) -> Weights:
    """With the shared experts as slices beside the routed ones."""
    return w._replace(
        shared_gate_up=shared_gate_up.contiguous(),
        shared_down=shared_down.contiguous(),
        n_shared=shared_down.shape[1] // w.width,
    )


def shared_experts(
    x: Tensor, shared_gate_up: Tensor, shared_down: Tensor, activation: str, alpha: float, limit: float
) -> Tensor:
    """`[T, H]`: the shared experts as one dense MLP, its two products by the vendor's library.

    shared_gate_up is `[2S, H]`, or `[S, H]` where nothing gates.
    """
    joint = F.linear(x, shared_gate_up)
    tokens, width = x.shape[0], shared_down.shape[1]
    hidden = x.new_empty((tokens, width))
    if not isinstance(tokens, int) or tokens > 0:
        block, pdl = min(1024, triton.next_power_of_2(width)), chained(x.device)
        launch(
            gated, (tokens, triton.cdiv(width, block)), joint, hidden, alpha, limit,
            WIDTH=width, GATED=joint.shape[1] != width, ACTIVATION=activation, BLOCK=block, PDL=pdl,
            num_warps=4, pdl=pdl,
        )  # fmt: skip
    return F.linear(hidden, shared_down)


def shared_sorted(x: Tensor, w: Weights, plan: Plan) -> Tensor:
    """`[T, H]`: w's one expert for every token, by a sorted plan: what `shared_experts` is without another library."""
    rows = rows_in_order(x.shape[0], plan.up.block_m, x.device)
    hidden, _ = up_sorted(x, rows, 1, w, plan)
    return down_sorted(hidden, rows, w, plan)


def rows_in_order(tokens: int, block_m: int, device: torch.device) -> Rows:
    """What `plan_rows` makes of one expert that every token visits, in one launch."""
    n_tiles = most_tiles(tokens, 1, block_m)
    rows = Rows(*carved((tokens, 3, n_tiles, n_tiles), device))
    pdl = chained(device)
    launch(
        in_order, (triton.cdiv(tokens, 1024),), *rows, tokens, n_tiles,
        BLOCK_M=block_m, BLOCK=1024, PDL=pdl, num_warps=4, pdl=pdl,
    )  # fmt: skip
    return rows
