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
    if shared_gate_up is None or shared_down is None:
        return run(x, experts, weights, w, plan_for(x, top_k, w)), experts
    if shared_gate is None and sliceable(w, shared_gate_up, shared_down):
        w = sliced(w, shared_gate_up, shared_down)
        return answer(x, experts, weights, w, plan_for(x, top_k, w)), experts
    extra = shared_experts(x, shared_gate_up, shared_down, activation, alpha, limit)
    if shared_gate is not None:
        extra = extra * F.linear(x, shared_gate).sigmoid()
    return run(x, experts, weights, w, plan_for(x, top_k, w), extra=extra), experts


def answer(x: Tensor, experts: Tensor, weights: Tensor, w: Weights, plan: Plan) -> Tensor:
    """`y [T, H]` of the routed experts and of w's shared slices, which a sorted plan has beside its launches."""
    if plan.regime != "sorted" or w.shared_gate_up is None or w.shared_down is None:
        return run(x, experts, weights, w, plan)
    extra = shared_experts(x, w.shared_gate_up, w.shared_down, w.activation, w.alpha, w.limit)
    return run(x, experts, weights, w._replace(shared_gate_up=None, shared_down=None, n_shared=0), plan, extra=extra)


def sliceable(w: Weights, shared_gate_up: Tensor, shared_down: Tensor) -> bool:
    """Whether the shared experts are a whole number of MLPs as wide as a routed expert, read the same way."""
    rows = all(weight.stride(2) == 1 for weight in (w.gate_up, w.down)) and w.gate_step == 1
    whole = shared_gate_up.is_contiguous() and shared_down.is_contiguous()
    return rows and whole and shared_down.shape[1] % w.width == 0


def sliced(w: Weights, shared_gate_up: Tensor, shared_down: Tensor) -> Weights:
    """With the shared experts as slices beside the routed ones."""
    n_shared = shared_down.shape[1] // w.width
    return w._replace(shared_gate_up=shared_gate_up, shared_down=shared_down, n_shared=n_shared)


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
