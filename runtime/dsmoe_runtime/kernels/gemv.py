"""dsmoe::gemv on a GPU: a program for a few rows of a weight, all weights in one launch.

Tiles are the best of a sweep on an H200 for the products of deepseek-moe-16b: with many rows four of them in steps of
1024 values, with few rows two in steps of 2048, so that there are programs enough.
"""

from __future__ import annotations

import triton
from torch import Tensor

from dsmoe_runtime.kernels.device.gemv import gemv_rows
from dsmoe_runtime.kernels.launch import chained, launch

MANY = 4096  # rows of all weights


def tile_of(rows: int, depth: int) -> tuple[int, int, int]:
    """Rows of a program, values of a step, warps."""
    block, step, warps = (4, 1024, 4) if rows >= MANY else (2, 2048, 2)
    return block, min(step, triton.next_power_of_2(depth)), warps


def gemv(x: Tensor, weights: list[Tensor]) -> Tensor:
    """`[..., N_1 + ...]`; arguments as in `ops.gemv`."""
    rows, depth = [weight.shape[0] for weight in weights], x.shape[-1]
    block, step, warps = tile_of(sum(rows), depth)
    y = x.new_empty((*x.shape[:-1], sum(rows)))
    unused = 3 - len(weights)
    counts, pdl = rows + unused * [0], chained(x.device)
    launch(
        gemv_rows, (sum(triton.cdiv(count, block) for count in rows),),
        x.contiguous(), *weights, *unused * [weights[0]], y,
        N0=counts[0], N1=counts[1], N2=counts[2], K=depth, BLOCK_N=block, BLOCK_K=step, PDL=pdl,
        num_warps=warps, pdl=pdl,
    )  # fmt: skip
    return y
