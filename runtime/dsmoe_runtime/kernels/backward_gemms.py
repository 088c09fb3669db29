"""The backward's grouped GEMMs: rows times the matrix of their expert, and the gradients of the matrices.

T tokens, H hidden size, E experts, I expert width, P slots. All tables have their rows in sorted order.
"""

from __future__ import annotations

import triton
from torch import Tensor

from dsmoe_runtime.kernels.backward_rows import Order, Saved
from dsmoe_runtime.kernels.device import dgrad, wgrad
from dsmoe_runtime.kernels.experts import blocks, by_tma, descriptor
from dsmoe_runtime.kernels.launch import chained, launch, upcast
from dsmoe_runtime.kernels.plan import Tile
from dsmoe_runtime.kernels.plan_backward import BackwardPlan


def row_grad(table: Tensor, weight: Tensor, saved: Saved, order: Order, tile: Tile, plan: BackwardPlan) -> Tensor:
    """`[P, N]`: each row of table `[P, D]` times its expert's matrix of weight `[E, D, N]`, in any strides.

    order is that of row tiles of tile.block_m rows. Rows that belong to no expert are undefined.
    """
    (n_slots, depth), width, pdl = table.shape, weight.shape[2], chained(table.device)
    out = table.new_empty((n_slots, width))
    rows_tma = plan.descriptors and by_tma(table)
    rows, half_rows = (_blocks(table, m, tile.block_k, rows_tma) for m in (tile.block_m, max(1, tile.block_m // 2)))
    matrix, matrix_tma = _matrix(weight, tile, plan)
    launch(
        dgrad.through_matrix, (order.tile_expert.shape[0] * triton.cdiv(width, tile.block_n),),
        rows, half_rows, matrix, *weight.stride(), saved.offsets, *order[1:], out,
        DEPTH=depth, WIDTH=width, GROUP=plan.group, HALF=plan.half, ROWS_TMA=rows_tma, WEIGHT_TMA=matrix_tma,
        UP=upcast(table.dtype), PDL=pdl, pdl=pdl, **blocks(tile),
    )  # fmt: skip
    return out


def matrix_grad(lhs: Tensor, rhs: Tensor, saved: Saved, tile: Tile, plan: BackwardPlan) -> Tensor:
    """`[E, M, N]`: each expert's rows of lhs `[P, M]`, transposed, times those of rhs `[P, N]`."""
    (m, n), num_experts, pdl = (lhs.shape[1], rhs.shape[1]), saved.num_experts, chained(lhs.device)
    out = lhs.new_empty((num_experts, m, n))
    tma = plan.descriptors and by_tma(lhs) and by_tma(rhs)
    lhs_blocks = _blocks(lhs, tile.block_k, tile.block_m, tma)
    rhs_blocks = _blocks(rhs, tile.block_k, tile.block_n, tma)
    launch(
        wgrad.wgrad, (num_experts * triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),),
        lhs, lhs_blocks, rhs, rhs_blocks, saved.offsets, out,
        M=m, N=n, GROUP=plan.group, TMA=tma, UP=upcast(lhs.dtype), PDL=pdl, pdl=pdl, **blocks(tile),
    )  # fmt: skip
    return out


def _blocks(table: Tensor, rows: int, columns: int, tma: bool) -> object:
    """A table as a kernel takes it: a descriptor of its blocks, or the table itself."""
    return descriptor(table, [rows, columns]) if tma else table


def _matrix(weight: Tensor, tile: Tile, plan: BackwardPlan) -> tuple[object, str]:
    """`weight [E, D, N]` as `through_matrix` takes it, and its word for that."""
    if plan.descriptors and by_tma(weight):
        return descriptor(weight, [1, tile.block_k, tile.block_n]), "kn"
    if plan.descriptors and by_tma(weight.mT):
        return descriptor(weight.mT, [1, tile.block_n, tile.block_k]), "nk"
    return weight, ""
