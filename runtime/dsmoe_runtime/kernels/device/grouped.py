"""Grouped GEMMs over sorted row tiles: gate and up with the activation behind them, and down.

P slots, H hidden size, I expert width. A weight comes by tensor descriptor (TMA) or by pointers with any strides. A
program walks over work items (row tile, column block). The last tile of an expert is half full on average, so a tile of
which at most half the rows are its own is computed at half height.
"""

import triton
import triton.language as tl

from dsmoe_runtime.kernels.device.activation import activate, activate_alone
from dsmoe_runtime.kernels.device.rows import fetch_ahead, tile_of


@triton.jit
def weight_block(
    weight, e, n, first_k, k, stride_e, stride_n, stride_k,
    N_ROWS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_N, BLOCK_K]` of expert e's weight: rows `n` (by TMA: `n` is the first of them), columns from first_k."""
    if TMA:
        block = weight.load([e, n, first_k]).reshape([BLOCK_N, BLOCK_K])
    else:
        mask = (n < N_ROWS)[:, None]
        if DEPTH % BLOCK_K != 0:
            mask = mask & (first_k + k < DEPTH)[None, :]
        rows = weight + e.to(tl.int64) * stride_e + n.to(tl.int64)[:, None] * stride_n
        block = tl.load(rows + (first_k + k)[None, :] * stride_k, mask=mask, other=0.0)
    return block


@triton.jit
def up_tile(
    x, gate_up, gate_up_bias, slots, hidden, joint,
    e, first_row, end_row, first_n, stride_t, stride_e, stride_n, stride_k, alpha, limit,
    H: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, GATE_STEP: tl.constexpr, UP_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_JOINT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One tile of `up_sorted`, BLOCK_M rows from first_row on, of which those before end_row are the expert's."""
    row = first_row + tl.arange(0, BLOCK_M)
    own = row < end_row
    token = (tl.load(slots + row, mask=own, other=0) // K).to(tl.int64)
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = n * GATE_STEP
    GATED: tl.constexpr = UP_OFFSET > 0
    ROWS: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    gate_at, up_at = at, UP_OFFSET + at
    if TMA:
        gate_at, up_at = first_n, UP_OFFSET + first_n
    source = x + token[:, None] * stride_t + k[None, :]
    gate_acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if GATED:
        up_acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            a = tl.load(source + start, mask=own[:, None], other=0.0)
        else:
            a = tl.load(source + start, mask=own[:, None] & (start + k < H)[None, :], other=0.0)
        gate = weight_block(gate_up, e, gate_at, start, k, stride_e, stride_n, stride_k, ROWS, H, BLOCK_N, BLOCK_K, TMA)
        if GATED:
            up = weight_block(gate_up, e, up_at, start, k, stride_e, stride_n, stride_k, ROWS, H, BLOCK_N, BLOCK_K, TMA)
        if UP:
            a, gate = a.to(tl.float32), gate.to(tl.float32)
            if GATED:
                up = up.to(tl.float32)
        gate_acc = tl.dot(a, gate.T, gate_acc, input_precision="ieee")
        if GATED:
            up_acc = tl.dot(a, up.T, up_acc, input_precision="ieee")
    wanted = own[:, None] & (n < WIDTH)[None, :]
    if HAS_BIAS:
        bias = gate_up_bias + e * ROWS + at
        gate_acc += tl.load(bias, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up_acc += tl.load(bias + UP_OFFSET, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
    if SAVE_JOINT:
        saved = joint + row.to(tl.int64)[:, None] * ROWS + at[None, :]
        tl.store(saved, gate_acc.to(joint.dtype.element_ty), mask=wanted)
        if GATED:
            tl.store(saved + UP_OFFSET, up_acc.to(joint.dtype.element_ty), mask=wanted)
    if GATED:
        value = activate(gate_acc, up_acc, ACTIVATION, alpha, limit)
    else:
        value = activate_alone(gate_acc, ACTIVATION)
    to = hidden + row.to(tl.int64)[:, None] * WIDTH + n[None, :]
    tl.store(to, value.to(hidden.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["alpha", "limit"])
def up_sorted(
    x, gate_up, gate_up_bias, slots, offsets, tile_expert, tile_row, hidden, joint, first_weights,
    stride_t, stride_e, stride_n, stride_k, alpha, limit,
    H: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    GATE_STEP: tl.constexpr, UP_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_JOINT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr, AHEAD: tl.constexpr, TMA: tl.constexpr, UP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`hidden[r] = act(gate x, up x)` for the BLOCK_M rows of a tile and BLOCK_N columns; `joint` before `act`.

    UP_OFFSET 0: nothing gates, `act(gate x)`.
    AHEAD > 0: while the rows are still being sorted, the L2 is asked for AHEAD bytes of each row of the weights
    (`first_weights`, plain pointers) that this program will read if every expert has one tile.
    """
    N_BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    if AHEAD > 0:
        tile, block = tile_of(tl.program_id(0), E, N_BLOCKS, GROUP)
        n = tl.minimum(block * BLOCK_N + tl.arange(0, BLOCK_N), WIDTH - 1)
        rows = first_weights + tl.minimum(tile, E - 1).to(tl.int64) * stride_e + n * stride_n
        fetch_ahead(rows, AHEAD)
        if UP_OFFSET > 0:
            fetch_ahead(rows + UP_OFFSET * stride_n, AHEAD)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n_tiles = tl.load(offsets + E + 1)
    for item in range(tl.program_id(0), n_tiles * N_BLOCKS, tl.num_programs(0)):
        tile, block = tile_of(item, n_tiles, N_BLOCKS, GROUP)
        e = tl.load(tile_expert + tile)
        first_row = tl.load(tile_row + tile)
        end_row = tl.load(offsets + e + 1)
        if HALF and end_row - first_row <= BLOCK_M // 2:
            up_tile(
                x, gate_up, gate_up_bias, slots, hidden, joint, e, first_row, end_row, block * BLOCK_N,
                stride_t, stride_e, stride_n, stride_k, alpha, limit, H, WIDTH, K, GATE_STEP, UP_OFFSET, ACTIVATION,
                HAS_BIAS, SAVE_JOINT, BLOCK_M // 2, BLOCK_N, BLOCK_K, TMA, UP,
            )  # fmt: skip
        else:
            up_tile(
                x, gate_up, gate_up_bias, slots, hidden, joint, e, first_row, end_row, block * BLOCK_N,
                stride_t, stride_e, stride_n, stride_k, alpha, limit, H, WIDTH, K, GATE_STEP, UP_OFFSET, ACTIVATION,
                HAS_BIAS, SAVE_JOINT, BLOCK_M, BLOCK_N, BLOCK_K, TMA, UP,
            )  # fmt: skip


@triton.jit
def down_tile(
    hidden, down, down_bias, slots, answers, e, first_row, end_row, first_n, stride_e, stride_n, stride_k,
    H: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    A_TMA: tl.constexpr, TMA: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One tile of `down_sorted`, as in `up_tile`."""
    row = first_row + tl.arange(0, BLOCK_M)
    own = row < end_row
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = n
    if TMA:
        at = first_n
    if not A_TMA:
        source = hidden + row.to(tl.int64)[:, None] * WIDTH + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        if A_TMA:
            a = hidden.load([first_row, start])
        elif WIDTH % BLOCK_K == 0:
            a = tl.load(source + start, mask=own[:, None], other=0.0)
        else:
            a = tl.load(source + start, mask=own[:, None] & (start + k < WIDTH)[None, :], other=0.0)
        b = weight_block(down, e, at, start, k, stride_e, stride_n, stride_k, H, WIDTH, BLOCK_N, BLOCK_K, TMA)
        if UP:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(down_bias + e * H + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
    wanted = own[:, None] & (n < H)[None, :]
    slot = tl.load(slots + row, mask=own, other=0).to(tl.int64)
    tl.store(answers + slot[:, None] * H + n[None, :], acc.to(answers.dtype.element_ty), mask=wanted)


@triton.jit
def down_sorted(
    hidden, hidden_rows, down, down_bias, slots, offsets, tile_expert, tile_row, answers, first_weights,
    stride_e, stride_n, stride_k,
    H: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr, AHEAD: tl.constexpr, A_TMA: tl.constexpr, TMA: tl.constexpr,
    UP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`answers[slots[r]] = down hidden[r]` for the rows of a tile and BLOCK_N columns.

    A_TMA: `hidden` is a descriptor, `hidden_rows` the same by pointers. The order of the rows is two kernels old, so
    the program knows its tile, and with AHEAD asks for its weights, before the hidden state is there.
    """
    N_BLOCKS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    n_tiles = tl.load(offsets + E + 1)
    if AHEAD > 0:
        if tl.program_id(0) < n_tiles * N_BLOCKS:
            tile, block = tile_of(tl.program_id(0), n_tiles, N_BLOCKS, GROUP)
            n = tl.minimum(block * BLOCK_N + tl.arange(0, BLOCK_N), H - 1)
            fetch_ahead(first_weights + tl.load(tile_expert + tile).to(tl.int64) * stride_e + n * stride_n, AHEAD)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for item in range(tl.program_id(0), n_tiles * N_BLOCKS, tl.num_programs(0)):
        tile, block = tile_of(item, n_tiles, N_BLOCKS, GROUP)
        e = tl.load(tile_expert + tile)
        first_row = tl.load(tile_row + tile)
        end_row = tl.load(offsets + e + 1)
        if HALF and end_row - first_row <= BLOCK_M // 2:
            down_tile(
                hidden_rows, down, down_bias, slots, answers, e, first_row, end_row, block * BLOCK_N,
                stride_e, stride_n, stride_k, H, WIDTH, HAS_BIAS, BLOCK_M // 2, BLOCK_N, BLOCK_K, False, TMA, UP,
            )  # fmt: skip
        else:
            down_tile(
                hidden, down, down_bias, slots, answers, e, first_row, end_row, block * BLOCK_N,
                stride_e, stride_n, stride_k, H, WIDTH, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K, A_TMA, TMA, UP,
            )  # fmt: skip
