"""Attention of one new token from its projections: turned, written into the cache, and answered in parts of the slots.

Parts as in `attend`, whose sum ends this one, too. The program whose part holds the new token's slot takes the new key
and value from the projections, not from the cache, which another program may not have written yet.
"""

import triton
import triton.language as tl

from dsmoe_runtime.kernels.device.attend import attend_more


@triton.jit
def turned(x, cos, sin, inside, h, HALF: tl.constexpr):
    """Both halves of a head, turned by the angles of its position, as float32."""
    one = tl.load(x + h, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(x + HALF + h, mask=inside, other=0.0).to(tl.float32)
    return one * cos - two * sin, two * cos + one * sin


@triton.jit(do_not_specialize=["scale"])
def decode_attention_part(
    qkv,
    cos,
    sin,
    position,
    key,
    value,
    answers,
    sizes,
    scale,
    A: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """SPAN slots of one head of queries, BLOCK_C at a time, in float32 whatever the cache holds.

    qkv `[(A + 2 G) D]`, cos and sin `[P, D / 2]`, key and value `[G, C, D]`; slots from `position` on are not read.
    """
    HALF: tl.constexpr = D // 2
    part, head = tl.program_id(0), tl.program_id(1)
    group = head // (A // G)
    h, d, c = tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    inside, within = h < HALF, d < D
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    now = tl.load(position)
    angle = now * HALF + h
    cosine = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    q1, q2 = turned(qkv + head * D, cosine, sine, inside, h, HALF)
    scale = tl.cast(scale, tl.float32)  # float64 from a compiled graph
    q1, q2 = q1 * scale, q2 * scale
    cache = group.to(tl.int64) * C * D
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    answer = tl.zeros([BLOCK_D], tl.float32)
    for start in range(part * SPAN, tl.minimum((part + 1) * SPAN, now).to(tl.int32), BLOCK_C):
        slot = start + c
        seen = (slot < now) & (slot < (part + 1) * SPAN)
        row = cache + slot.to(tl.int64) * D
        halves = seen[:, None] & inside[None, :]
        k1 = tl.load(key + row[:, None] + h[None, :], mask=halves, other=0.0).to(tl.float32)
        k2 = tl.load(key + row[:, None] + HALF + h[None, :], mask=halves, other=0.0).to(tl.float32)
        v = tl.load(value + row[:, None] + d[None, :], mask=seen[:, None] & within[None, :], other=0.0)
        score = tl.where(seen, tl.sum(k1 * q1[None, :] + k2 * q2[None, :], 1), float("-inf"))
        best, total, answer = attend_more(best, total, answer, score, v)
    if (part * SPAN <= now) & (now < (part + 1) * SPAN):
        kind = key.dtype.element_ty
        k1, k2 = turned(qkv + (A + group) * D, cosine, sine, inside, h, HALF)
        k1, k2 = k1.to(kind), k2.to(kind)
        v = tl.load(qkv + (A + G + group) * D + d, mask=within, other=0.0)
        if head % (A // G) == 0:
            row = cache + now * D
            tl.store(key + row + h, k1, mask=inside)
            tl.store(key + row + HALF + h, k2, mask=inside)
            tl.store(value + row + d, v, mask=within)
        score = tl.sum(k1.to(tl.float32) * q1 + k2.to(tl.float32) * q2, 0)
        best, total, answer = attend_more(best, total, answer, tl.expand_dims(score, 0), tl.expand_dims(v, 0))
    row = head * tl.num_programs(0) + part
    tl.store(sizes + 2 * row, best)
    tl.store(sizes + 2 * row + 1, total)
    tl.store(answers + row * D + d, answer, mask=within)
