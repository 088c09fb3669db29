"""dsmoe::attend on a GPU: the slots of a cache in parts, a program for each part of each head, then their sum.

With a program for each head alone a model of 16 heads keeps an eighth of the GPU busy. A heads, C slots, D head width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dsmoe_runtime.kernels.device.attend import attend_part, attend_sum
from dsmoe_runtime.kernels.launch import chained, launch

WIDEST = 256  # of a head
BLOCK = 16  # slots that a program of one warp reads at a time: many programs, each with little to wait for
MOST_PARTS = 128  # so many answers of a head one program sums


def refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why these kernels cannot do what the torch rule does, or None."""
    if query.shape[-1] > WIDEST:
        return f"heads {query.shape[-1]} wide; the kernels take at most {WIDEST}"
    if any(tensor.stride(-1) != 1 for tensor in (query, key, value)):
        return "the values of a head do not lie side by side"
    return None


def span_of(slots: int) -> int:
    """Slots that a program reads in all."""
    return BLOCK * triton.cdiv(slots, BLOCK * MOST_PARTS)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`[1, A, 1, D]`; arguments as in `ops.attend`."""
    _, heads, slots, width = key.shape
    span = span_of(slots)
    parts = triton.cdiv(slots, span)
    y = query.new_empty(query.shape)
    answers = query.new_empty((heads, parts, width), dtype=torch.float32)
    sizes = query.new_empty((heads, parts, 2), dtype=torch.float32)
    pdl, depth = chained(query.device), triton.next_power_of_2(width)
    launch(
        attend_part, (parts, heads), query, key, value, mask.contiguous(), answers, sizes, slots, scale,
        query.stride(1), *key.stride()[1:3], *value.stride()[1:3],
        SPAN=span, D=width, BLOCK_C=BLOCK, BLOCK_D=depth,
        PDL=pdl, num_warps=1, pdl=pdl,
    )  # fmt: skip
    launch(
        attend_sum, (heads,), answers, sizes, y, PARTS=parts, D=width, PADDED=triton.next_power_of_2(parts),
        BLOCK_D=depth, PDL=pdl, num_warps=4, pdl=pdl,
    )  # fmt: skip
    return y
