"""Before the GEMMs of the backward: where each slot's row is, the row tiles, and the tokens' rows in sorted order."""

import triton
import triton.language as tl


@triton.jit
def place_slots(
    slots, offsets, place, tile_expert, tile_row, tile_count,
    EXPERTS: tl.constexpr, LANES: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """place `[P]`: the row of each slot that belongs to an expert. Of each row tile: its expert, and its first row.

    CHUNK rows a program, and at least a program per expert. LANES is EXPERTS up to a power of two.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    chunk = tl.arange(0, CHUNK)
    row = program * CHUNK + chunk
    real = row < tl.load(offsets + EXPERTS)
    tl.store(place + tl.load(slots + row, mask=real, other=0), row, mask=real)
    lane = tl.arange(0, LANES)
    begin = tl.load(offsets + lane, mask=lane < EXPERTS, other=0)
    end = tl.load(offsets + lane + 1, mask=lane < EXPERTS, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    if program == 0:
        tl.store(tile_count, tl.sum(tiles, 0))
    own = tl.sum(tl.where(lane == program, tiles, 0), 0)
    first_tile = tl.sum(tl.where(lane < program, tiles, 0), 0)
    first_row = tl.sum(tl.where(lane == program, begin, 0), 0)
    for start in range(0, own, CHUNK):
        tile = start + chunk
        tl.store(tile_expert + first_tile + tile, program + 0 * tile, mask=tile < own)
        tl.store(tile_row + first_tile + tile, first_row + tile * BLOCK_M, mask=tile < own)


@triton.jit
def sort_rows(
    grad, grad_stride, x, x_stride, experts, place, sorted_grad, sorted_x,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BOTH: tl.constexpr, BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program per token, which copies its row of grad (BOTH: and of x) to the rows `[P, HIDDEN]` of its slots.

    Read once a token and not once a slot: an expert's tokens are so far apart that the L2 keeps none for the next one.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    for h in range(0, HIDDEN, BLOCK_H):
        columns = h + tl.arange(0, BLOCK_H)
        from_grad = tl.load(grad + token * grad_stride + columns, mask=columns < HIDDEN, other=0.0)
        if BOTH:
            from_x = tl.load(x + token * x_stride + columns, mask=columns < HIDDEN, other=0.0)
        for k in tl.static_range(TOP_K):
            expert = tl.load(experts + token * TOP_K + k)
            chosen = (expert >= 0) & (expert < EXPERTS)
            row = tl.load(place + token * TOP_K + k, mask=chosen, other=0).to(tl.int64)
            inside = columns < HIDDEN * tl.where(chosen, 1, 0)
            tl.store(sorted_grad + row * HIDDEN + columns, from_grad, mask=inside)
            if BOTH:
                tl.store(sorted_x + row * HIDDEN + columns, from_x, mask=inside)
