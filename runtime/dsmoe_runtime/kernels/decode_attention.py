"""Attention of one new token on a GPU, from its projections to its heads' answers; the cache is written in place.

Two launches, as `attend` has: parts of the slots of each head, then their sum. For ONNX Runtime's `DsDecodeAttention`;
graphs of torch's write their cache themselves and call `dsmoe::attend`. A heads of queries, G of keys, C slots, P
positions that angles are known of, D head width.
"""

from __future__ import annotations

import triton
from torch import Tensor

from dsmoe_runtime.kernels.attend import BLOCK, WIDEST, in_parts, summed
from dsmoe_runtime.kernels.device.decode_attention import decode_attention_part
from dsmoe_runtime.kernels.launch import chained, launch


def refusal(heads: int, groups: int, width: int) -> str | None:
    """Why these kernels cannot do it, or None."""
    if heads % groups:
        return f"{heads} heads of queries are no multiple of {groups} of keys"
    if width > WIDEST or width % 2:
        return f"heads {width} wide; the kernels take even widths up to {WIDEST}"
    return None


def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """`[1, 1, A D]`: the answers to `qkv [1, 1, (A + 2 G) D]`, queries, keys and values before they are turned.

    cos, sin: `[P, D / 2]`. position: int64 `[1]`, less than C and P. key, value: `[1, G, C, D]`, of which slots before
    `position` are read; the new key, turned, and the new value are written into that one.
    """
    _, groups, slots, width = key.shape
    heads = qkv.shape[-1] // width - 2 * groups
    span, answers, sizes = in_parts(qkv, heads, slots, width)
    pdl = chained(qkv.device)
    launch(
        decode_attention_part, (answers.shape[1], heads), qkv, cos, sin, position, key, value, answers, sizes, scale,
        A=heads, G=groups, C=slots, D=width, SPAN=span, BLOCK_C=BLOCK, BLOCK_D=triton.next_power_of_2(width),
        PDL=pdl, num_warps=1, pdl=pdl,
    )  # fmt: skip
    return summed(answers, sizes, qkv.new_empty((1, 1, heads * width)))
