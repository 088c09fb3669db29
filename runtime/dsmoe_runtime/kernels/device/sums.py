"""The sums of the backward: over a token's slots, and over an expert's rows. Each in a fixed order, in float32."""

import triton
import triton.language as tl


@triton.jit
def token_sums(
    grad_rows, products, experts, place, grad, grad_stride, down_bias, grad_x, grad_weights,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BIASED: tl.constexpr, BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program per token: grad_x[t] is the sum of its slots' grad_rows in the order of k, grad_weights[t, k] products.

    grad_rows `[P, HIDDEN]` and products `[P]` are in sorted order. A slot whose id is outside [0, EXPERTS) adds nothing
    and its weight has gradient 0. `down_bias` `[E, HIDDEN]`, if BIASED, is the part of an answer that products lacks.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(TOP_K):
        expert = tl.load(experts + token * TOP_K + k)
        chosen = (expert >= 0) & (expert < EXPERTS)
        total = tl.load(products + tl.load(place + token * TOP_K + k, mask=chosen, other=0), mask=chosen, other=0.0)
        if BIASED:
            dot = tl.zeros((BLOCK_H,), tl.float32)
            for h in range(0, HIDDEN, BLOCK_H):
                columns = h + tl.arange(0, BLOCK_H)
                inside = columns < HIDDEN * tl.where(chosen, 1, 0)
                bias = tl.load(down_bias + expert.to(tl.int64) * HIDDEN + columns, mask=inside, other=0.0)
                answer = tl.load(grad + token * grad_stride + columns, mask=inside, other=0.0)
                dot += bias.to(tl.float32) * answer.to(tl.float32)
            total += tl.sum(dot, 0)
        tl.store(grad_weights + token * TOP_K + k, total.to(grad_weights.dtype.element_ty))
    for h in range(0, HIDDEN, BLOCK_H):
        columns = h + tl.arange(0, BLOCK_H)
        acc = tl.zeros((BLOCK_H,), tl.float32)
        for k in tl.static_range(TOP_K):
            expert = tl.load(experts + token * TOP_K + k)
            chosen = (expert >= 0) & (expert < EXPERTS)
            row = tl.load(place + token * TOP_K + k, mask=chosen, other=0).to(tl.int64)
            inside = columns < HIDDEN * tl.where(chosen, 1, 0)
            acc += tl.load(grad_rows + row * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + token * HIDDEN + columns, acc.to(grad_x.dtype.element_ty), mask=columns < HIDDEN)


@triton.jit
def expert_sums(
    table, weights, slots, offsets, out,
    N: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[e] `[N]`: the sum of an expert's rows of table `[P, N]`; WEIGHTED: of each times its routing weight."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets + expert)
    stop = tl.load(offsets + expert + 1)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for r in range(start, stop, BLOCK_R):
        rows = r + tl.arange(0, BLOCK_R)
        inside = (rows < stop)[:, None] & (columns < N)[None, :]
        values = tl.load(table + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=inside, other=0.0)
        values = values.to(tl.float32)
        if WEIGHTED:
            slot = tl.load(slots + rows, mask=rows < stop, other=0)
            values *= tl.load(weights + slot, mask=rows < stop, other=0.0).to(tl.float32)[:, None]
        acc += values
    sums = tl.sum(acc, 0).to(out.dtype.element_ty)
    tl.store(out + expert.to(tl.int64) * N + columns, sums, mask=columns < N)
