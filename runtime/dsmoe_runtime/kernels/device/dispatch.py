"""Which slots belong to each expert: a stable counting sort of the expert ids, and the row tiles of a grouped GEMM.

P slots (T tokens x K experts), E experts. A slot whose id is outside [0, E) belongs to nobody.
"""

import triton
import triton.language as tl


@triton.jit
def expert_of(e, E: tl.constexpr):
    """An id as 32 bits, -1 where it is no expert's; ids may be wider. (Loads stay with the callers: of a call that gets
    a pointer, and whose result a store's address depends on, torch thinks that it writes there.)
    """
    return tl.where((e >= 0) & (e < E), e, -1).to(tl.int32)


@triton.jit(do_not_specialize=["n_slots", "max_tiles"])
def sort_few(
    ids,
    slots,
    offsets,
    tile_expert,
    tile_row,
    n_slots,
    max_tiles,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One launch, a program per expert and one for the end: each reads all ids and writes its own part of the order."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.program_id(0)
    experts = tl.arange(0, E_PAD)
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros([E_PAD], dtype=tl.int32)
    for start in range(0, n_slots, CHUNK):
        slot = start + lane
        e = expert_of(tl.load(ids + slot, mask=slot < n_slots, other=-1), E)
        counts += tl.histogram(e, E_PAD, mask=e >= 0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    offset = tl.sum(tl.where(experts < expert, counts, 0), 0)
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), 0)
    tl.store(offsets + expert, offset)
    if expert == E:
        tl.store(offsets + E + 1, first_tile)
        for start in range(first_tile, max_tiles, CHUNK):
            tile = start + lane
            tl.store(tile_expert + tile, -1 + 0 * tile, mask=tile < max_tiles)
    else:
        own_tiles = tl.sum(tl.where(experts == expert, tiles, 0), 0)
        for start in range(0, own_tiles, CHUNK):
            tile = start + lane
            tl.store(tile_expert + first_tile + tile, expert + 0 * tile, mask=tile < own_tiles)
            tl.store(tile_row + first_tile + tile, offset + tile * BLOCK_M, mask=tile < own_tiles)
        for start in range(0, n_slots, CHUNK):
            slot = start + lane
            mine = (expert_of(tl.load(ids + slot, mask=slot < n_slots, other=-1), E) == expert).to(tl.int32)
            place = offset + tl.cumsum(mine, 0) - mine
            tl.store(slots + place, slot, mask=mine != 0)
            offset += tl.sum(mine, 0)


@triton.jit(do_not_specialize=["n_slots"])
def count(ids, counts, n_slots, E: tl.constexpr, E_PAD: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """First of two launches: `counts [chunks, E_PAD]`, how often each expert occurs in each chunk of slots."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk = tl.program_id(0)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    e = expert_of(tl.load(ids + slot, mask=slot < n_slots, other=-1), E)
    found = tl.histogram(e, E_PAD, mask=e >= 0)
    tl.store(counts + chunk * E_PAD + tl.arange(0, E_PAD), found)


@triton.jit(do_not_specialize=["n_slots", "n_chunks", "max_tiles"])
def place(
    ids,
    counts,
    slots,
    offsets,
    tile_expert,
    tile_row,
    n_slots,
    n_chunks,
    max_tiles,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Second launch: each chunk's slots go behind those of the chunks before it; the tiles are shared out likewise.

    A slot's rank within a part is the number of earlier slots of its expert: every pair is compared, which takes a GPU
    less time than a running count for every expert.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk = tl.program_id(0)
    experts = tl.arange(0, E_PAD)
    before = tl.zeros([E_PAD], dtype=tl.int32)
    total = tl.zeros([E_PAD], dtype=tl.int32)
    for start in range(0, n_chunks, ROWS):
        row = start + tl.arange(0, ROWS)
        part = tl.load(counts + row[:, None] * E_PAD + experts[None, :], mask=(row < n_chunks)[:, None], other=0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where((row < chunk)[:, None], part, 0), 0)
    end = tl.cumsum(total, 0)
    begin = end - total
    if chunk == 0:
        tl.store(offsets + experts, begin, mask=experts < E)
        tl.store(offsets + E, tl.sum(total, 0))
        tl.store(offsets + E + 1, tl.sum((total + BLOCK_M - 1) // BLOCK_M, 0))
    tiles = (total + BLOCK_M - 1) // BLOCK_M
    last_tile = tl.cumsum(tiles, 0)
    first_tile = last_tile - tiles
    for start in range(chunk * TILES, max_tiles, TILES * tl.num_programs(0)):
        tile = start + tl.arange(0, TILES)
        owns = (tile[:, None] >= first_tile[None, :]) & (tile[:, None] < last_tile[None, :])
        owner = tl.sum(tl.where(owns, experts[None, :] + 1, 0), 1) - 1
        row = tl.sum(tl.where(owns, begin[None, :] + (tile[:, None] - first_tile[None, :]) * BLOCK_M, 0), 1)
        tl.store(tile_expert + tile, owner, mask=tile < max_tiles)
        tl.store(tile_row + tile, row, mask=tile < max_tiles)
    at = begin + before
    lane = tl.arange(0, PART)
    earlier = lane[None, :] < lane[:, None]
    for start in range(0, CHUNK, PART):
        slot = chunk * CHUNK + start + lane
        e = expert_of(tl.load(ids + slot, mask=slot < n_slots, other=-1), E)
        rank = tl.sum(((e[:, None] == e[None, :]) & earlier).to(tl.int32), 1)
        first = tl.gather(at, tl.maximum(e, 0), 0)
        tl.store(slots + first + rank, slot, mask=e >= 0)
        at += tl.histogram(e, E_PAD, mask=e >= 0)
