"""Attention of one query a head, in parts of the slots; a part leaves its answer, its maximum and its sum of powers.

    part p of head h:   m = max s_c,  l = sum exp(s_c - m),  a = sum exp(s_c - m) v_c     over the slots c that are seen
    all of head h:      y = sum_p exp(m_p - max m) a_p / sum_p exp(m_p - max m) l_p

A part that sees nothing has m = -inf, reads no key and no value, and leaves no answer.
"""

import triton
import triton.language as tl


@triton.jit
def attend_more(best, total, answer, score, v):
    """A part's maximum, sum of powers and answer with more slots, at least one of them seen."""
    higher = tl.maximum(best, tl.max(score, 0))
    power, kept = tl.exp(score - higher), tl.exp(best - higher)
    return higher, total * kept + tl.sum(power, 0), answer * kept + tl.sum(power[:, None] * v.to(tl.float32), 0)


@triton.jit(do_not_specialize=["scale"])
def attend_part(
    query,
    key,
    value,
    mask,
    answers,
    sizes,
    slots,
    scale,
    stride_qa,
    stride_ka,
    stride_kc,
    stride_va,
    stride_vc,
    SPAN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """SPAN slots of one head, BLOCK_C at a time, in float32 whatever the cache holds."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    scale = tl.cast(scale, tl.float32)  # float64 from a compiled graph
    q = tl.load(query + head * stride_qa + d, mask=inside, other=0.0).to(tl.float32) * scale
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    answer = tl.zeros([BLOCK_D], tl.float32)
    for start in range(part * SPAN, (part + 1) * SPAN, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        seen = tl.load(mask + c, mask=c < slots, other=0).to(tl.int32) != 0
        if tl.max(seen.to(tl.int32), 0) > 0:
            wanted = seen[:, None] & inside[None, :]
            k = tl.load(key + head * stride_ka + c[:, None] * stride_kc + d[None, :], mask=wanted, other=0.0)
            v = tl.load(value + head * stride_va + c[:, None] * stride_vc + d[None, :], mask=wanted, other=0.0)
            score = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
            best, total, answer = attend_more(best, total, answer, score, v)
    row = head * tl.num_programs(0) + part
    tl.store(sizes + 2 * row, best)
    tl.store(sizes + 2 * row + 1, total)
    tl.store(answers + row * D + d, answer, mask=inside)


@triton.jit
def attend_sum(
    answers,
    sizes,
    y,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """The parts of one head, in their order."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, PADDED), tl.arange(0, BLOCK_D)
    row = head * PARTS + part
    best = tl.load(sizes + 2 * row, mask=part < PARTS, other=float("-inf"))
    total = tl.load(sizes + 2 * row + 1, mask=part < PARTS, other=0.0)
    share = tl.exp(best - tl.max(best, 0))
    there = (best > float("-inf"))[:, None] & (d < D)[None, :]
    answer = tl.load(answers + row[:, None] * D + d[None, :], mask=there, other=0.0)
    result = tl.sum(answer * share[:, None], 0) / tl.sum(share * total, 0)
    tl.store(y + head * D + d, result.to(y.dtype.element_ty), mask=d < D)
