"""Grouped GEMMs over sorted rows for sm_90, warp-specialised: some warps copy tiles in, others multiply and store.

    out[r, n] = f(sum_k x[row r, k] * w[expert of r, n, k])      r: rows sorted by expert

An item of work is 128 rows of one expert times 2 * HALF rows of its weights, in two halves `lo` and `hi`: gate and up
of the same HALF columns (then f is the activation), or 2 * HALF neighbouring columns (f is the identity). Every program
walks the items pid, pid + programs, ... The producer fills a ring of STAGES slots, each with BLOCK_K of the depth of an
item. Two consumers, warpgroups, work on every item, 64 rows each. They meet only at the ring, so that they drift apart
by up to STAGES slots, and one stores while the other multiplies. Rows past an expert's end cost nothing in steps of 64.

Weights, and in `down` the rows too, come by the copy engine (TMA). In `up` the rows are gathered by cp.async, and so
    full[s]   counts the bytes that TMA writes (one arrival), and an arrival of each producer thread that its copies
              trigger when they are done (noinc: an arrival like any other, counted when the barrier is made)
    empty[s]  counts the two consumers, done with slot s.
cp.async writes by the generic proxy, wgmma reads by the async one: a consumer fences between the wait and the product.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.language import PropagateNan
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Names that changed between Triton 3.6 and 3.9.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
gather = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
NAN_STAYS = gl.constexpr(PropagateNan.ALL)
COPIERS = gl.constexpr(4)  # warps of the producer that gathers


@gluon.jit
def place(item, row_tiles, COL_TILES: gl.constexpr, GROUP: gl.constexpr):
    """Row tile and column tile of an item: GROUP row tiles side by side, all their columns, the next GROUP."""
    group = item // (GROUP * COL_TILES)
    first = group * GROUP
    size = gl.minimum(row_tiles - first, GROUP)
    local = item - group * (GROUP * COL_TILES)
    return first + local % size, local // size


@gluon.jit
def step(stage, phase, STAGES: gl.constexpr):
    """The next slot of the ring, and the parity of its barriers."""
    wrap = stage + 1 == STAGES
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def before(stage, STAGES: gl.constexpr):
    """The slot before. (A variable set to `stage` is not carried through a loop, but taken for the same value.)"""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def token_rows(x, stride, slots, row, end, TOP_K: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    """Pointers to the first columns of the tokens of ROWS slots; past the end, to token 0, whose product nobody stores.

    stride: of x, in units of 8 elements, so that Triton sees that 16 bytes can be copied at a time.
    """
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    token = gl.load(slots + rows, mask=rows < end, other=0) // TOP_K
    columns = gl.arange(0, layout.size_per_thread[1] * layout.threads_per_warp[1], gl.SliceLayout(0, layout))
    return x + (token.to(gl.int64) * stride * 8)[:, None] + columns[None, :]


@gluon.jit
def gather_block(slot, pointers, k, K: gl.constexpr, BLOCK_K: gl.constexpr, layout: gl.constexpr):
    """Begin to copy columns k * BLOCK_K and on of each row; zeros past the depth."""
    if K % BLOCK_K == 0:
        gather(slot, pointers + k * BLOCK_K)
    else:
        columns = k * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
        gather(slot, pointers + k * BLOCK_K, mask=gl.expand_dims(columns < K, 0))


@gluon.jit
def produce(
    x, stride, lo_desc, hi_desc, x_ring, w_ring, full, empty, tiles, row_tiles,
    K: gl.constexpr, TOP_K: gl.constexpr, COL_TILES: gl.constexpr, TILE_N: gl.constexpr, EXPERT_ROWS: gl.constexpr,
    HI_SHIFT: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Copy the items in. TOP_K > 0: x is a pointer to tokens, else a descriptor of sorted rows."""
    slots, offsets, tile_expert, tile_row = tiles
    ROWS: gl.constexpr = x_ring.type.shape[1]
    BLOCK_K: gl.constexpr = x_ring.type.shape[2]
    W_BYTES: gl.constexpr = 2 * lo_desc.block_type.nbytes
    X_BYTES: gl.constexpr = ROWS * BLOCK_K * 2
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [COPIERS, 1], [1, 0])
    stage = 0
    phase = 1  # a fresh barrier counts as having completed the phase before its first
    for item in range(gl.program_id(0), row_tiles * COL_TILES, gl.num_programs(0)):
        row_tile, col_tile = place(item, row_tiles, COL_TILES, GROUP)
        expert = gl.load(tile_expert + row_tile)
        row = gl.load(tile_row + row_tile)
        end = gl.load(offsets + expert + 1)
        w_row = expert * EXPERT_ROWS + col_tile * TILE_N
        more = row + ROWS < end
        if TOP_K > 0:
            first = token_rows(x, stride, slots, row, end, TOP_K, ROWS, layout)
            second = token_rows(x, stride, slots, row + ROWS, end, TOP_K, ROWS, layout)
        for k in range((K + BLOCK_K - 1) // BLOCK_K):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            if TOP_K > 0:
                mbarrier.expect(bar, W_BYTES)
            else:
                mbarrier.expect(bar, W_BYTES + X_BYTES, pred=more == 0)
                mbarrier.expect(bar, W_BYTES + 2 * X_BYTES, pred=more)
                async_load(x, [row, k * BLOCK_K], bar, x_ring.index(2 * stage))
                async_load(x, [row + ROWS, k * BLOCK_K], bar, x_ring.index(2 * stage + 1), pred=more)
            async_load(lo_desc, [w_row, k * BLOCK_K], bar, w_ring.index(2 * stage))
            async_load(hi_desc, [w_row + HI_SHIFT, k * BLOCK_K], bar, w_ring.index(2 * stage + 1))
            if TOP_K > 0:
                gather_block(x_ring.index(2 * stage), first, k, K, BLOCK_K, layout)
                if more:
                    gather_block(x_ring.index(2 * stage + 1), second, k, K, BLOCK_K, layout)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = step(stage, phase, STAGES)


@gluon.jit
def multiply(
    x_ring, w_ring, full, empty, stage, phase,
    DEPTH: gl.constexpr, PART: gl.constexpr, GATHERED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One item's product. A slot is handed back once the product after it has been issued and its own is done."""
    ROWS: gl.constexpr = x_ring.type.shape[1]
    COLS: gl.constexpr = 2 * w_ring.type.shape[1]
    if REINTERPRET:
        w_slots = w_ring.reinterpret(w_ring.dtype, [STAGES, COLS, w_ring.type.shape[2]], w_ring.layout)
    else:
        w_slots = w_ring._reinterpret(w_ring.dtype, [STAGES, COLS, w_ring.type.shape[2]], w_ring.layout)
    acc = gl.zeros([ROWS, COLS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16]))
    for k in range(DEPTH):
        mbarrier.wait(full.index(stage), phase)
        if GATHERED:
            hopper.fence_async_shared()
        w = w_slots.index(stage).permute((1, 0))
        token = hopper.warpgroup_mma(x_ring.index(2 * stage + PART), w, acc, use_acc=k != 0, is_async=True)
        acc = hopper.warpgroup_mma_wait(1, deps=(token,))
        mbarrier.arrive(empty.index(before(stage, STAGES)), count=1, pred=k != 0)
        stage, phase = step(stage, phase, STAGES)
    acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(before(stage, STAGES)), count=1)
    return acc


@gluon.jit
def skip(full, empty, stage, phase, DEPTH: gl.constexpr, STAGES: gl.constexpr):
    """Hand back an item's slots unread, each once it is full, so that no slot is handed back twice in a round."""
    for _ in range(DEPTH):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = step(stage, phase, STAGES)


@gluon.jit
def activate(gate, up, ACTIVATION: gl.constexpr, alpha, limit):
    """As in `device.activation`, of which this is the spelling for these kernels."""
    if ACTIVATION == "gelu":
        return gate * (0.5 + 0.5 * gl.erf(gate * 0.7071067811865476)) * up
    if ACTIVATION == "gelu_tanh":
        return gate / (1 + gl.exp(-gate * (1.5957691216057308 + 0.07135481627260025 * gate * gate))) * up
    if ACTIVATION == "relu":
        return gl.where(gate < 0, 0.0, gate) * up
    if ACTIVATION == "relu2":
        return gl.where(gate < 0, 0.0, gate * gate) * up
    if ACTIVATION != "silu":
        gate = gl.minimum(gate, limit, propagate_nan=NAN_STAYS)
        up = gl.minimum(gl.maximum(up, -limit, propagate_nan=NAN_STAYS), limit, propagate_nan=NAN_STAYS)
    if ACTIVATION == "swiglu_oai":
        return (up + 1) * (gate / (1 + gl.exp(-alpha * gate)))
    return gate / (1 + gl.exp(-gate)) * up


@gluon.jit
def store_half(value, buffer, out, rows, live, column, N: gl.constexpr, STRIDE: gl.constexpr, layout: gl.constexpr):
    """Through shared memory, so that neighbouring threads write 16 neighbouring bytes each."""
    buffer.store(value.to(buffer.dtype))
    columns = column + gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
    pointers = out + (rows * STRIDE)[:, None] + columns[None, :]
    gl.store(pointers, buffer.load(layout), mask=live[:, None] & (columns < N)[None, :])


@gluon.jit
def consume(
    x_ring, w_ring, full, empty, buffer, out, joint, tiles, row_tiles, alpha, limit,
    PART: gl.constexpr, DEPTH: gl.constexpr, COL_TILES: gl.constexpr, N: gl.constexpr, ACTIVATION: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Multiply and store rows PART * 64 and on of every item."""
    slots, offsets, tile_expert, tile_row = tiles
    ROWS: gl.constexpr = x_ring.type.shape[1]
    HALF: gl.constexpr = w_ring.type.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [4, 1], [1, 0])
    slot = 0
    for item in range(gl.program_id(0), row_tiles * COL_TILES, gl.num_programs(0)):
        row_tile, col_tile = place(item, row_tiles, COL_TILES, GROUP)
        end = gl.load(offsets + gl.load(tile_expert + row_tile) + 1)
        row = gl.load(tile_row + row_tile) + PART * ROWS
        stage = slot % STAGES
        phase = (slot // STAGES) & 1
        if row < end:
            rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            live = rows < end
            if ACTIVATION == "none":
                rows = gl.load(slots + rows, mask=live, other=0)
            rows = rows.to(gl.int64)
            acc = multiply(x_ring, w_ring, full, empty, stage, phase, DEPTH, PART, ACTIVATION != "none", STAGES)
            lo, hi = acc.reshape((ROWS, 2, HALF)).permute((0, 2, 1)).split()
            if ACTIVATION == "none":
                column = col_tile * (2 * HALF)
                store_half(lo, buffer, out, rows, live, column, N, N, layout)
                store_half(hi, buffer, out, rows, live, column + HALF, N, N, layout)
            else:
                column = col_tile * HALF
                value = activate(lo, hi, ACTIVATION, alpha, limit).to(buffer.dtype)
                lo, hi = lo.to(buffer.dtype), hi.to(buffer.dtype)  # from here on half the registers
                store_half(value, buffer, out, rows, live, column, N, N, layout)
                if joint is not None:
                    store_half(lo, buffer, joint, rows, live, column, N, 2 * N, layout)
                    store_half(hi, buffer, joint + N, rows, live, column, N, 2 * N, layout)
        else:
            skip(full, empty, stage, phase, DEPTH, STAGES)
        slot += DEPTH


@gluon.jit(do_not_specialize=["alpha", "limit"])
def product_specialised(
    x, lo_desc, hi_desc, slots, offsets, tile_expert, tile_row, out, joint, stride, alpha, limit,
    N: gl.constexpr, K: gl.constexpr, E: gl.constexpr, TOP_K: gl.constexpr, EXPERT_ROWS: gl.constexpr,
    ACTIVATION: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """up, with an activation: x is a pointer, rows `stride` * 8 apart, out `[P, N]` in sorted order, joint `[P, 2N]`.

    down, ACTIVATION "none", TOP_K 0: x is a descriptor of sorted rows `[P, K]` in boxes of 64, and row r of the product
    is row slots[r] of out. lo_desc, hi_desc: each half's rows of the weights in boxes of HALF, EXPERT_ROWS an expert.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: gl.constexpr = lo_desc.dtype
    HALF: gl.constexpr = lo_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = lo_desc.block_type.shape[1]
    DEPTH: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILE_N: gl.constexpr = 2 * HALF if TOP_K == 0 else HALF
    HI_SHIFT: gl.constexpr = HALF if TOP_K == 0 else 0
    COL_TILES: gl.constexpr = (N + TILE_N - 1) // TILE_N
    WARPS: gl.constexpr = 1 if TOP_K == 0 else COPIERS
    CONSUMER: gl.constexpr = 232 if TOP_K == 0 else 224  # registers; with the producer's a third of the 504 there are
    PRODUCER: gl.constexpr = 40 if TOP_K == 0 else 56
    row_tiles = gl.load(offsets + E + 1)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, BLOCK_K], lo_desc.layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES * 2, HALF, BLOCK_K], lo_desc.layout)
    buffers = gl.allocate_shared_memory(dtype, [2, 64, HALF], gl.NVMMASharedLayout.get_default_for([64, HALF], dtype))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 if TOP_K == 0 else 1 + 32 * COPIERS)
        mbarrier.init(empty.index(i), count=2)
    tiles = (slots, offsets, tile_expert, tile_row)
    gl.warp_specialize([
        (consume, (x_ring, w_ring, full, empty, buffers.index(0), out, joint, tiles, row_tiles, alpha, limit,
                   0, DEPTH, COL_TILES, N, ACTIVATION, STAGES, GROUP)),
        (consume, (x_ring, w_ring, full, empty, buffers.index(1), out, joint, tiles, row_tiles, alpha, limit,
                   1, DEPTH, COL_TILES, N, ACTIVATION, STAGES, GROUP)),
        (produce, (x, stride, lo_desc, hi_desc, x_ring, w_ring, full, empty, tiles, row_tiles,
                   K, TOP_K, COL_TILES, TILE_N, EXPERT_ROWS, HI_SHIFT, STAGES, GROUP)),
    ], [4, WARPS], [CONSUMER, PRODUCER])  # fmt: skip
