"""The gate's matrix product: logits of a block of tokens for every expert, selected on the spot or stored in parts.

Columns are those of `device.route`. Each step over H is a product of its own that is added in float32: tensor cores
truncate their running sum, which over thousands of terms would cost a float32 router its last five bits.
"""

import triton
import triton.language as tl

from dsmoe_runtime.kernels.device.route import choose, expert_of, rounded


@triton.jit
def product(x, w, ACTIVATION: tl.constexpr, UP: tl.constexpr):
    """`x [T, H] w [H, C]` in float32, exact but for the sum.

    Equal 16-bit dtypes: their products fit float32. bfloat16 x and float32 w: w is the sum of three bfloat16. Anything
    else: float32 multiplications. ACTIVATION: w is rounded to x's dtype first.
    """
    if ACTIVATION:
        w = rounded(w.to(tl.float32), x.dtype).to(x.dtype)
    if UP:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee")
    if x.dtype == w.dtype and x.dtype != tl.float32:
        return tl.dot(x, w)
    if x.dtype == tl.bfloat16 and w.dtype == tl.float32:
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(x, high, tl.dot(x, middle, tl.dot(x, low)))
    return tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee")


@triton.jit
def logits_of(
    x_ptr,
    w_ptr,
    token,
    expert,
    valid,
    T,
    start,
    H: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UP: tl.constexpr,
):
    """The part `[start, start + SPAN)` of H of the logits `[BLOCK_T, COLUMNS]`, in float32."""
    step = tl.arange(0, BLOCK_H)
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * H + step[None, :]
    w_ptrs = w_ptr + expert[None, :] * H + step[:, None]
    logits = tl.zeros([BLOCK_T, COLUMNS], tl.float32)
    for i in range(SPAN // BLOCK_H):
        h = start + i * BLOCK_H
        inside = h + step < H
        x = tl.load(x_ptrs + h, mask=(token < T)[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_ptrs + h, mask=valid[None, :] & inside[:, None], other=0.0)
        logits = tl.fma(product(x, w, ACTIVATION, UP), 1.0, logits)  # `+` would become the dot's own running sum
    return logits


@triton.jit(do_not_specialize=["T"])
def gate_kernel(
    x_ptr,
    w_ptr,
    router_bias_ptr,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    T,
    eps,
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_MEMBERS: tl.constexpr,
    PADDED_K: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP2: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROUTER_BIASED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gate and selection of BLOCK_T tokens in one program."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty if ACTIVATION else tl.float32
    MEMBERS: tl.constexpr = E // GROUPS
    COLUMNS: tl.constexpr = PADDED_GROUPS * PADDED_MEMBERS
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, COLUMNS)
    expert = expert_of(column, MEMBERS, PADDED_MEMBERS)
    valid = (column % PADDED_MEMBERS < MEMBERS) & (expert < E)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    logits = logits_of(x_ptr, w_ptr, token, expert, valid, T, 0, H, SPAN, BLOCK_T, BLOCK_H, COLUMNS, ACTIVATION, UP)
    if ROUTER_BIASED:
        router_bias = tl.load(router_bias_ptr + expert, mask=valid, other=0.0).to(tl.float32)
        logits += rounded(router_bias, dtype)[None, :]
    choose(
        rounded(logits, dtype),
        bias_ptr,
        weights_ptr,
        experts_ptr,
        token,
        T,
        eps,
        scale,
        E,
        K,
        BLOCK_T,
        GROUPS,
        PADDED_GROUPS,
        PADDED_MEMBERS,
        PADDED_K,
        TOPK_GROUP,
        TOP2,
        SCORE,
        RENORMALIZE,
        BIASED,
        dtype,
    )


@triton.jit(do_not_specialize=["T"])
def gate_parts_kernel(
    x_ptr,
    w_ptr,
    parts_ptr,
    T,
    H: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One part of H of the logits of BLOCK_T tokens, to `parts [PARTS, T, E]`; `route_kernel` adds them up."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    expert = tl.arange(0, COLUMNS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    logits = logits_of(
        x_ptr, w_ptr, token, expert, expert < E, T, part * SPAN, H, SPAN, BLOCK_T, BLOCK_H, COLUMNS, ACTIVATION, UP
    )
    cell = (part.to(tl.int64) * T + token.to(tl.int64)[:, None]) * E + expert[None, :]
    tl.store(parts_ptr + cell, logits, mask=(token < T)[:, None] & (expert < E)[None, :])
