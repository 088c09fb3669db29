"""One row times the rows of up to three weights.

The weights of the first step are asked for before `x` is there: who puts this kernel behind another one promises that
the other does not write them.
"""

import triton
import triton.language as tl


@triton.jit
def gemv_rows(
    x,
    w0,
    w1,
    w2,
    y,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """`y[n] = sum_k w[n, k] x[k]`, BLOCK_N rows of one weight, in float32; a weight with no rows is not read."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    BEFORE1: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    BEFORE2: tl.constexpr = BEFORE1 + (N1 + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0)
    w, rows, out = w0, N0, 0
    if N1 > 0:
        if block >= BEFORE2:
            w, rows, out, block = w2, N2, N0 + N1, block - BEFORE2
        elif block >= BEFORE1:
            w, rows, out, block = w1, N1, N0, block - BEFORE1
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = w + n.to(tl.int64)[:, None] * K
    k = tl.arange(0, BLOCK_K)
    wanted = (n < rows)[:, None]
    first = tl.load(row + k[None, :], mask=wanted & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = first.to(tl.float32) * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    for start in range(BLOCK_K, K, BLOCK_K):
        h = start + k
        part = tl.load(row + h[None, :], mask=wanted & (h < K)[None, :], other=0.0, eviction_policy="evict_first")
        total += part.to(tl.float32) * tl.load(x + h, mask=h < K, other=0.0).to(tl.float32)[None, :]
    tl.store(y + out + n, tl.sum(total, 1).to(y.dtype.element_ty), mask=n < rows)
