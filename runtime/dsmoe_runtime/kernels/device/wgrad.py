"""Gradients of the experts' matrices: for each expert the product of two tables over its own rows."""

import triton
import triton.language as tl


@triton.jit
def block_of(table, row, stop, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """`[BLOCK_K, BLOCK]` of table `[P, WIDTH]` from `row` on, by pointers; zeros from `stop` on."""
    rows = row + tl.arange(0, BLOCK_K)
    inside = (rows < stop)[:, None] if WIDTH % BLOCK == 0 else (rows < stop)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(table + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)


@triton.jit
def any_rows(table, rows, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`[rows, columns]` of table `[P, WIDTH]`, by pointers."""
    at = table + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    if WIDTH % BLOCK == 0:
        values = tl.load(at)
    else:
        values = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    return values


@triton.jit
def wgrad(
    lhs, lhs_blocks, rhs, rhs_blocks, offsets, out,
    M: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, UP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[e] `[M, N]` = sum over the rows r of expert e of lhs[r, :] outer rhs[r, :], in float32; zeros without rows.

    lhs `[P, M]` and rhs `[P, N]` are in sorted order. TMA: whole blocks of an expert's rows come by the descriptors
    `*_blocks`; the block behind them, whose other rows are the next expert's, by pointers, asked for before the others.
    """
    TILES_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.program_id(0) // (TILES_M * TILES_N)
    inside = tl.program_id(0) % (TILES_M * TILES_N)
    group = inside // (GROUP * TILES_N)
    height = tl.minimum(TILES_M - group * GROUP, GROUP)
    inside = inside % (GROUP * TILES_N)
    first_m = (group * GROUP + inside % height) * BLOCK_M
    first_n = (inside // height) * BLOCK_N
    ms = first_m + tl.arange(0, BLOCK_M)
    ns = first_n + tl.arange(0, BLOCK_N)
    start = tl.load(offsets + expert)
    stop = tl.load(offsets + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        whole = start + (stop - start) // BLOCK_K * BLOCK_K
        rest = whole + tl.arange(0, BLOCK_K)
        # Asked for here, masked below: a masked load would be given shared memory of its own all through the loop.
        a_rest = any_rows(lhs, tl.minimum(rest, tl.maximum(stop, 1) - 1), ms, M, BLOCK_M)
        b_rest = any_rows(rhs, tl.minimum(rest, tl.maximum(stop, 1) - 1), ns, N, BLOCK_N)
        for k in range(start, whole, BLOCK_K):
            acc = tl.dot(tl.trans(lhs_blocks.load([k, first_m])), rhs_blocks.load([k, first_n]), acc)
        a_rest = tl.where((rest < stop)[:, None], a_rest, 0.0)
        b_rest = tl.where((rest < stop)[:, None], b_rest, 0.0)
        acc = tl.dot(tl.trans(a_rest), b_rest, acc)
    else:
        for k in range(start, stop, BLOCK_K):
            a = block_of(lhs, k, stop, ms, M, BLOCK_M, BLOCK_K)
            b = block_of(rhs, k, stop, ns, N, BLOCK_N, BLOCK_K)
            if UP:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    at = out + expert.to(tl.int64) * (M * N) + ms[:, None] * N + ns[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :])
