"""What `device.dispatch` makes of ids that are all the same: every token in one expert, in order. No id is read."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_slots", "max_tiles"])
def in_order(
    slots,
    offsets,
    tile_expert,
    tile_row,
    n_slots,
    max_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for each BLOCK slots, and for as many row tiles, of which there are no more."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tiles = (n_slots + BLOCK_M - 1) // BLOCK_M
    tl.store(slots + index, index, mask=index < n_slots)
    tl.store(tile_expert + index, tl.where(index < tiles, 0, -1), mask=index < max_tiles)
    tl.store(tile_row + index, index * BLOCK_M, mask=index < max_tiles)
    if tl.program_id(0) == 0:
        at = tl.arange(0, 4)
        tl.store(offsets + at, tl.where(at == 0, 0, tl.where(at == 1, n_slots, tiles)), mask=at < 3)
