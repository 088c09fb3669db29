"""dsmoe::experts on a GPU: the routed experts, and shared ones beside them, by the regime that a plan names."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dsmoe_runtime.kernels import specialised
from dsmoe_runtime.kernels.choose import choose, shape_of
from dsmoe_runtime.kernels.device import combine, grouped, pairs, scan
from dsmoe_runtime.kernels.dispatch import Rows, plan_rows
from dsmoe_runtime.kernels.gpu import facts, named
from dsmoe_runtime.kernels.launch import chained, launch, tracing, upcast
from dsmoe_runtime.kernels.plan import Plan, Tile

log = logging.getLogger(__name__)

COMBINE_BLOCK = 1024
MANY_TOKENS = 4096  # of a prompt whose length is free


class Weights(NamedTuple):
    """Expert weights as the kernels read them, from any layout of the operator; `shared` slices if n_shared > 0.

    gate_up, down: seen as `[E, 2I, H]` and `[E, H, I]`, any strides. Gate i is row `i * gate_step`, up i
    `up_offset + i * gate_step`. up_offset 0: nothing gates, gate_up is `[E, I, H]`.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    alpha: float
    limit: float
    gate_step: int
    up_offset: int
    shared_gate_up: Tensor | None = None
    shared_down: Tensor | None = None
    n_shared: int = 0

    @property
    def width(self) -> int:
        """I."""
        return self.down.shape[2]

    @classmethod
    def of(
        cls,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: str,
        alpha: float,
        limit: float,
        layout: str,
    ) -> Weights:
        """From the operator's arguments."""
        if layout.endswith("_transposed"):
            gate_up, down = gate_up.mT, down.mT
        step, offset = (2, 1) if layout.startswith("interleaved") else (1, down.shape[2])
        if layout.startswith("ungated"):
            offset = 0
        return cls(gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, step, offset)


def experts(
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
) -> Tensor:
    """`y [T, H]`; arguments as in `ops.experts`."""
    w = Weights.of(gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout)
    return run(x, experts, weights, w, plan_for(x, experts.shape[1], w))


def plan_for(x: Tensor, top_k: int, w: Weights) -> Plan:
    """The plan of a call, without specialised kernels where they cannot run; the log says so, once for each reason."""
    plan = plan_of_sizes(x, top_k, w)
    if plan.specialised and (reason := specialised.refusal(x, w)) is not None:
        tell_once(reason)
        return replace(plan, specialised=False)
    return plan


@cache
def tell_once(reason: str) -> None:
    """To the log."""
    log.info("the plan names specialised kernels, and the plain ones run: %s", reason)


def plan_of_sizes(x: Tensor, top_k: int, w: Weights) -> Plan:
    """The plan as it is chosen. In a graph for any number of tokens it is one that is right for all of them."""
    tokens: int | torch.SymInt = x.shape[0]
    device = facts(x.device) if x.device.type == "cuda" else named("H200")
    sizes = (x.shape[1], w.width, w.gate_up.shape[0], top_k, x.dtype, w.n_shared)
    if isinstance(tokens, int):
        return choose(shape_of(max(1, tokens), *sizes), device)
    plan = choose(shape_of(tokens.node.hint or MANY_TOKENS, *sizes), device)
    return plan if plan.regime == "sorted" else choose(shape_of(MANY_TOKENS, *sizes), device)


def run(x: Tensor, experts: Tensor, weights: Tensor, w: Weights, plan: Plan, extra: Tensor | None = None) -> Tensor:
    """`y [T, H]` in x's dtype: the weighted answers of `experts [T, K]`, of w's shared slices, and `extra [T, H]`."""
    tokens = x.shape[0]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if isinstance(tokens, int) and tokens == 0:
        return y
    if plan.regime == "pairs" and extra is not None:
        return run(x, experts, weights, w, plan).add_(extra)
    if x.stride(1) != 1:
        x = x.contiguous()
    experts, weights = experts.contiguous(), weights.contiguous()
    if plan.regime == "pairs":
        return run_pairs(x, experts, weights, w, plan, y)
    top_k = experts.shape[1]
    if plan.regime == "scan":
        answers = run_scan(x, experts, w, plan)
    else:
        rows = plan_rows(experts, w.gate_up.shape[0], plan.up.block_m)
        hidden, _ = up_sorted(x, rows, top_k, w, plan)
        answers = down_sorted(hidden, rows, w, plan)
    combine_answers(answers, experts, weights, y, w, extra)
    return y


def combine_answers(
    answers: Tensor, experts: Tensor, weights: Tensor, y: Tensor, w: Weights, extra: Tensor | None = None
) -> None:
    """Into y `[T, H]`: each token's answers `[T (K + n_shared), H]`, weighted, and `extra [T, H]`."""
    tokens, hidden_size = y.shape
    block, pdl = min(COMBINE_BLOCK, triton.next_power_of_2(hidden_size)), chained(y.device)
    launch(
        combine.combine, (tokens, triton.cdiv(hidden_size, block)),
        answers, experts, weights, extra, y, tokens,
        H=hidden_size, E=w.gate_up.shape[0], K=experts.shape[1], N_SHARED=w.n_shared,
        HAS_EXTRA=extra is not None, BLOCK_H=block, PDL=pdl, num_warps=4, pdl=pdl,
    )  # fmt: skip


def run_pairs(x: Tensor, experts: Tensor, weights: Tensor, w: Weights, plan: Plan, y: Tensor) -> Tensor:
    """Two launches, matrix times vector, for a handful of tokens."""
    (tokens, hidden_size), top_k = x.shape, experts.shape[1]
    slots, pdl = top_k + w.n_shared, chained(x.device)
    hidden = x.new_empty((tokens * slots, w.width))
    up, down = plan.up, plan.down
    sizes = {"H": hidden_size, "WIDTH": w.width, "E": w.gate_up.shape[0], "K": top_k, "N_SHARED": w.n_shared}
    launch(
        pairs.up_pairs, (triton.cdiv(w.width, up.block_n), tokens * slots),
        x, experts, w.gate_up, w.gate_up_bias, shared(w.shared_gate_up, w.gate_up), hidden, tokens,
        x.stride(0), *w.gate_up.stride(), w.alpha, w.limit, **sizes,
        GATE_STEP=w.gate_step, UP_OFFSET=w.up_offset, ACTIVATION=w.activation, HAS_BIAS=w.gate_up_bias is not None,
        BLOCK_N=up.block_n, BLOCK_K=up.block_k, PDL=pdl, num_warps=up.num_warps, num_stages=up.num_stages, pdl=pdl,
    )  # fmt: skip
    ahead = min(top_k, down.num_stages) if down.block_k >= w.width else 0
    launch(
        pairs.down_tokens, (triton.cdiv(hidden_size, down.block_n), tokens),
        hidden, experts, weights, w.down, w.down_bias, shared(w.shared_down, w.down), y, *w.down.stride(), **sizes,
        HAS_BIAS=w.down_bias is not None, BLOCK_N=down.block_n, BLOCK_K=down.block_k, AHEAD=ahead,
        PDL=pdl, num_warps=down.num_warps, pdl=pdl,
    )  # fmt: skip
    return y


def run_scan(x: Tensor, experts: Tensor, w: Weights, plan: Plan) -> Tensor:
    """Two launches in which every expert's programs look for its slots: `answers [T (K + n_shared), H]`."""
    (tokens, hidden_size), top_k = x.shape, experts.shape[1]
    num_experts, pdl = w.gate_up.shape[0], chained(x.device)
    hidden = x.new_empty((tokens * (top_k + w.n_shared), w.width))
    answers = x.new_empty((hidden.shape[0], hidden_size))
    common: dict[str, Any] = {
        "H": hidden_size, "WIDTH": w.width, "E": num_experts, "K": top_k, "N_SHARED": w.n_shared,
        "SLOTS": max(16, triton.next_power_of_2(tokens * top_k)), "UP": upcast(x.dtype), "PDL": pdl,
    }  # fmt: skip
    launch(
        scan.up_scan, (triton.cdiv(w.width, plan.up.block_n), num_experts + w.n_shared),
        x, experts, w.gate_up, w.gate_up_bias, shared(w.shared_gate_up, w.gate_up), hidden, tokens,
        x.stride(0), *w.gate_up.stride(), w.alpha, w.limit,
        GATE_STEP=w.gate_step, UP_OFFSET=w.up_offset, ACTIVATION=w.activation,
        HAS_BIAS=w.gate_up_bias is not None, pdl=pdl, **common, **blocks(plan.up),
    )  # fmt: skip
    launch(
        scan.down_scan, (triton.cdiv(hidden_size, plan.down.block_n), num_experts + w.n_shared),
        hidden, experts, w.down, w.down_bias, shared(w.shared_down, w.down), answers, tokens, *w.down.stride(),
        HAS_BIAS=w.down_bias is not None, pdl=pdl, **common, **blocks(plan.down),
    )  # fmt: skip
    return answers


def up_sorted(
    x: Tensor, rows: Rows, top_k: int, w: Weights, plan: Plan, save_joint: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`hidden [P, I]` in sorted order, and `joint [P, 2I]` (ungated `[P, I]`), before the activation, if asked for."""
    if plan.specialised:
        return specialised.up(x, rows, top_k, w, save_joint)
    tokens, hidden_size = x.shape
    n_slots, num_experts, pdl = tokens * top_k, w.gate_up.shape[0], chained(x.device)
    hidden = x.new_empty((n_slots, w.width))
    joint = x.new_empty((n_slots, w.gate_up.shape[1])) if save_joint else None
    tma = by_tma(w.gate_up) and w.gate_step == 1
    weight = descriptor(w.gate_up, [1, plan.up.block_n, plan.up.block_k]) if tma else w.gate_up
    launch(
        grouped.up_sorted, programs(x, rows, plan.up, w.width, plan),
        x, weight, w.gate_up_bias, *rows, hidden, joint, w.gate_up,
        x.stride(0), *w.gate_up.stride(), w.alpha, w.limit,
        H=hidden_size, WIDTH=w.width, E=num_experts, K=top_k, GATE_STEP=w.gate_step, UP_OFFSET=w.up_offset,
        ACTIVATION=w.activation, HAS_BIAS=w.gate_up_bias is not None, SAVE_JOINT=save_joint,
        GROUP=plan.group, HALF=plan.half, AHEAD=plan.ahead if tma else 0, TMA=tma,
        UP=upcast(x.dtype), PDL=pdl, pdl=pdl, **blocks(plan.up),
    )  # fmt: skip
    return hidden, joint


def down_sorted(hidden: Tensor, rows: Rows, w: Weights, plan: Plan) -> Tensor:
    """`answers [P, H]` in the order of the slots."""
    if plan.specialised:
        return specialised.down(hidden, rows, w)
    hidden_size, tile = w.down.shape[1], plan.down
    answers = hidden.new_empty((hidden.shape[0], hidden_size))
    pdl, tma = chained(hidden.device), by_tma(w.down)
    a_tma = plan.tma_rows and by_tma(hidden) and tile.block_m >= 64
    weight = descriptor(w.down, [1, tile.block_n, tile.block_k]) if tma else w.down
    source = descriptor(hidden, [tile.block_m, tile.block_k]) if a_tma else hidden
    launch(
        grouped.down_sorted, programs(hidden, rows, tile, hidden_size, plan),
        source, hidden, weight, w.down_bias, *rows, answers, w.down, *w.down.stride(),
        H=hidden_size, WIDTH=w.width, E=w.down.shape[0], HAS_BIAS=w.down_bias is not None,
        GROUP=plan.group, HALF=plan.half, AHEAD=plan.ahead if tma else 0, A_TMA=a_tma, TMA=tma,
        UP=upcast(hidden.dtype), PDL=pdl, pdl=pdl, **blocks(tile),
    )  # fmt: skip
    return answers


def programs(rows_like: Tensor, rows: Rows, tile: Tile, columns: int, plan: Plan) -> tuple[int]:
    """One program per work item that there can be, or as many as the GPU holds at once if the plan says so."""
    items = rows.tile_expert.shape[0] * triton.cdiv(columns, tile.block_n)
    if plan.resident == 0 or rows_like.device.type != "cuda":
        return (items,)
    return (min(items, plan.resident * facts(rows_like.device).multiprocessors),)


def shared(weight: Tensor | None, routed: Tensor) -> Tensor:
    """What a kernel takes for the shared weights: it names the pointer also where there are none."""
    return routed if weight is None else weight


def blocks(tile: Tile) -> dict[str, Any]:
    """A tile as a kernel's arguments."""
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def by_tma(tensor: Tensor) -> bool:
    """Whether the copy engine can read the tensor: Hopper, rows of unit stride that begin at multiples of 16 bytes."""
    strides = [s * tensor.element_size() for s in tensor.stride()[:-1]]
    return (
        chained(tensor.device)
        and not tracing()  # a graph has no node for a descriptor that is made outside of Dynamo
        and tensor.element_size() == 2
        and tensor.stride(-1) == 1
        and all(s % 16 == 0 for s in strides)
        and tensor.data_ptr() % 16 == 0
    )


def descriptor(tensor: Tensor, block: list[int]) -> object:
    """A tensor-map descriptor of `tensor` for blocks of this shape."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
