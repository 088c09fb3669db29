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
    span, answers, sizes = in_parts(query, heads, slots, width)
    pdl = chained(query.device)
    launch(
        attend_part, (answers.shape[1], heads), query, key, value, mask.contiguous(), answers, sizes, slots, scale,
        query.stride(1), *key.stride()[1:3], *value.stride()[1:3],
        SPAN=span, D=width, BLOCK_C=BLOCK, BLOCK_D=triton.next_power_of_2(width),
        PDL=pdl, num_warps=1, pdl=pdl,
    )  # fmt: skip
    return summed(answers, sizes, query.new_empty(query.shape))


def in_parts(like: Tensor, heads: int, slots: int, width: int) -> tuple[int, Tensor, Tensor]:
    """Slots of a part; room for the answer, and for the maximum and the sum of powers, of each part of each head."""
    span = span_of(slots)
    shape = (heads, triton.cdiv(slots, span))
    answers, sizes = (like.new_empty((*shape, last), dtype=torch.float32) for last in (width, 2))
    return span, answers, sizes


def summed(answers: Tensor, sizes: Tensor, y: Tensor) -> Tensor:
    """`y`, with the answers of each head's parts made one."""
    (heads, parts, width), pdl = answers.shape, chained(y.device)
    launch(
        attend_sum, (heads,), answers, sizes, y, PARTS=parts, D=width, PADDED=triton.next_power_of_2(parts),
        BLOCK_D=triton.next_power_of_2(width), PDL=pdl, num_warps=4, pdl=pdl,
    )  # fmt: skip
    return y
