"""Warp-specialised grouped GEMMs of the experts, for Hopper: what they can take, and how they are launched.

T tokens, H hidden size, E experts, I expert width, K experts per token, P = T K slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsmoe_runtime.kernels.dispatch import Rows
from dsmoe_runtime.kernels.gpu import Device, facts, named
from dsmoe_runtime.kernels.launch import chained, launch, tracing

if TYPE_CHECKING:
    from dsmoe_runtime.kernels.experts import Weights

ROWS = 128  # of a row tile: the height that `plan_rows` must be given
HALF, BLOCK_K, STAGES, GROUP = 128, 64, 4, 8


def refusal(x: Tensor, w: Weights) -> str | None:
    """Why these kernels cannot run this call, or None."""
    if not chained(x.device) or not device_of(x).wgmma:
        return "only Hopper has the products of warpgroups that they use"
    if tracing():
        return "a graph has no node for the descriptors that the copy engine needs"
    if x.element_size() != 2 or {w.gate_up.dtype, w.down.dtype} != {x.dtype}:
        return f"x, gate_up and down are {x.dtype}, {w.gate_up.dtype} and {w.down.dtype}, not the same 16 bits"
    if w.gate_up_bias is not None or w.down_bias is not None:
        return "they add no biases"
    if w.up_offset == 0:
        return "nothing gates: they multiply by gate and up side by side"
    if w.gate_step != 1:
        return "gate and up are interleaved"
    for name, weight in (("gate_up", w.gate_up), ("down", w.down)):
        expert, row, element = weight.stride()
        if element != 1 or row % 8 or expert % row or weight.shape[2] % 8 or weight.data_ptr() % 16:
            return f"{name} has strides {weight.stride()}: rows must begin at 16 bytes, and all be as far apart"
    if (x.stride(1) == 1 and x.stride(0) % 8) or x.data_ptr() % 16:
        return f"x has strides {x.stride()}: its rows must begin at 16 bytes"
    return None


def up(x: Tensor, rows: Rows, top_k: int, w: Weights, save_joint: bool = False) -> tuple[Tensor, Tensor | None]:
    """`hidden [P, I]` in sorted order, and `joint [P, 2I]`, before the activation, if asked for."""
    reason = refusal(x, w)
    assert reason is None, reason
    (n_experts, _, hidden_size), width, n_slots = w.gate_up.shape, w.width, x.shape[0] * top_k
    hidden = x.new_empty((n_slots, width))
    joint = x.new_empty((n_slots, 2 * width)) if save_joint else None
    gates, ups = (flat(w.gate_up, first, width) for first in (0, width))
    run(
        x, gates, ups, rows, hidden, joint, x.stride(0) // 8, w.alpha, w.limit, HALF,
        K=hidden_size, E=n_experts, TOP_K=top_k, EXPERT_ROWS=w.gate_up.stride(0) // w.gate_up.stride(1),
        ACTIVATION=w.activation,
    )  # fmt: skip
    return hidden, joint


def down(hidden: Tensor, rows: Rows, w: Weights) -> Tensor:
    """`answers [P, H]` in the order of the slots."""
    n_experts, hidden_size, width = w.down.shape
    answers = hidden.new_empty((hidden.shape[0], hidden_size))
    weight = flat(w.down, 0, hidden_size)
    run(
        boxes(hidden, ROWS // 2), weight, weight, rows, answers, None, 1, 1.0, 1.0, 2 * HALF,
        K=width, E=n_experts, TOP_K=0, EXPERT_ROWS=w.down.stride(0) // w.down.stride(1), ACTIVATION="none",
    )  # fmt: skip
    return answers


def run(
    x: Any, lo: Tensor, hi: Tensor, rows: Rows, out: Tensor, joint: Tensor | None,
    stride: int, alpha: float, limit: float, columns: int, **sizes: Any,
) -> None:  # fmt: skip
    """One program for each multiprocessor, or for each item of `columns` columns if there are fewer."""
    items = rows.tile_expert.shape[0] * -(-out.shape[1] // columns)
    pdl = chained(out.device)
    from dsmoe_runtime.kernels.device.specialised import product_specialised  # Gluon: nobody else needs it

    launch(
        product_specialised, (min(items, device_of(out).multiprocessors),),
        x, boxes(lo, HALF), boxes(hi, HALF), *rows, out, joint, stride, alpha, limit,
        N=out.shape[1], STAGES=STAGES, GROUP=GROUP, PDL=pdl, num_warps=4, pdl=pdl, **sizes,
    )  # fmt: skip


def device_of(tensor: Tensor) -> Device:
    """The facts of its GPU; without one, of that for which kernels are built ahead of time."""
    return facts(tensor.device) if tensor.device.type == "cuda" else named("H200")


def flat(weight: Tensor, first: int, count: int) -> Tensor:
    """`weight [E, N, K]` from row `first` of the first expert to row `first + count` of the last, as one matrix."""
    n_experts, (expert, row, _) = weight.shape[0], weight.stride()
    shape = ((n_experts - 1) * (expert // row) + count, weight.shape[2])
    return torch.as_strided(weight, shape, (row, 1), weight.storage_offset() + first * row)


def boxes(matrix: Tensor, height: int) -> object:
    """A tensor-map descriptor of `matrix` for blocks of `height` rows."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [height, BLOCK_K], layout)
