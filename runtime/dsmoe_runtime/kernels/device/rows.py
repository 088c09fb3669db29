"""Which rows a program of a grouped GEMM works on: of a sorted tile, or found among the ids by the program itself."""

import triton
import triton.language as tl


@triton.jit
def tile_of(item, n_tiles, N_BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """Row tile and column block of a work item: GROUP row tiles side by side walk the columns together, for the L2."""
    group = item // (GROUP * N_BLOCKS)
    first = group * GROUP
    size = tl.minimum(n_tiles - first, GROUP)
    within = item % (GROUP * N_BLOCKS)
    return first + within % size, within // size


@triton.jit
def found_rows(mine, rank, lane, start, count, BLOCK_M: tl.constexpr):
    """The slots with rank `start` ... among those that are `mine`, and which of the BLOCK_M exist."""
    want = start + tl.arange(0, BLOCK_M)
    hit = mine[None, :] & (rank[None, :] == want[:, None])
    return tl.sum(tl.where(hit, lane[None, :], 0), 1), want < count


@triton.jit
def fetch_ahead(rows, BYTES: tl.constexpr):
    """Ask the L2 for the first BYTES behind each pointer of `rows`, and do not wait (sm_90; 16-byte aligned)."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r", [rows.to(tl.int64), tl.full(rows.shape, BYTES, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
