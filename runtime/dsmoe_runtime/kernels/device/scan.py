"""Few rows an expert: a program per expert and block of columns finds its own rows among the ids; nothing is sorted.

T tokens, H hidden size, I expert width, K experts per token. The last N_SHARED of a token's K + N_SHARED slots, and the
"experts" E ... E + N_SHARED - 1, are slices of width I of the shared experts, which every token visits; then stride_k
must be 1.
"""

import triton
import triton.language as tl

from dsmoe_runtime.kernels.device.activation import activate, activate_alone
from dsmoe_runtime.kernels.device.rows import found_rows


@triton.jit
def own_slots(ids, e, n_tokens, E: tl.constexpr, K: tl.constexpr, N_SHARED: tl.constexpr, SLOTS: tl.constexpr):
    """Index `i` into the ids (or tokens, for a shared expert), which are this expert's, and their rank and number."""
    lane = tl.arange(0, SLOTS)
    if e < E:
        mine = tl.load(ids + lane, mask=lane < n_tokens * K, other=-1) == e
    else:
        mine = lane < n_tokens
    one = mine.to(tl.int32)
    return lane, mine, tl.cumsum(one, 0) - one, tl.sum(one, 0)


@triton.jit
def slot_and_token(found, e, E: tl.constexpr, K: tl.constexpr, N_SHARED: tl.constexpr):
    """Row among the T (K + N_SHARED) slots, and token, of the indices that `own_slots` gives."""
    token = tl.where(e < E, found // K, found)
    return token * (K + N_SHARED) + tl.where(e < E, found % K, K + e - E), token


@triton.jit(do_not_specialize=["n_tokens", "alpha", "limit"])
def up_scan(
    x,
    ids,
    gate_up,
    gate_up_bias,
    shared,
    hidden,
    n_tokens,
    stride_t,
    stride_e,
    stride_n,
    stride_k,
    alpha,
    limit,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    N_SHARED: tl.constexpr,
    GATE_STEP: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UP: tl.constexpr,
    PDL: tl.constexpr,
):
    """`hidden[slot] = act(gate x, up x)` for one expert's rows and BLOCK_N columns; the weight is read once.

    UP_OFFSET 0: nothing gates, `act(gate x)`.
    """
    GATED: tl.constexpr = UP_OFFSET > 0
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    e = tl.program_id(1)
    lane, mine, rank, count = own_slots(ids, e, n_tokens, E, K, N_SHARED, SLOTS)
    if count == 0:
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weight, row, apart = gate_up + e.to(tl.int64) * stride_e, stride_n * GATE_STEP, UP_OFFSET * stride_n
    if N_SHARED > 0:  # numbers are chosen, not blocks of pointers, which Triton 3.9 would keep in registers and spill
        weight = tl.where(e < E, weight, shared + ((e - E) * WIDTH).to(tl.int64) * H)
        row, apart = tl.where(e < E, row, H), tl.where(e < E, apart, N_SHARED * WIDTH * H)
    gate_rows = weight + n.to(tl.int64) * row
    up_rows = gate_rows + apart
    for begin in range(0, count, BLOCK_M):
        found, own = found_rows(mine, rank, lane, begin, count, BLOCK_M)
        slot, token = slot_and_token(found, e, E, K, N_SHARED)
        rows = x + token.to(tl.int64)[:, None] * stride_t
        gate_acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if GATED:
            up_acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, H, BLOCK_K):
            inside = (n < WIDTH)[:, None]
            there = own[:, None]
            if H % BLOCK_K != 0:
                inside = inside & (start + k < H)[None, :]
                there = there & (start + k < H)[None, :]
            gate = tl.load(gate_rows[:, None] + (start + k)[None, :] * stride_k, mask=inside, other=0.0)
            if GATED:
                up = tl.load(up_rows[:, None] + (start + k)[None, :] * stride_k, mask=inside, other=0.0)
            a = tl.load(rows + (start + k)[None, :], mask=there, other=0.0)
            if UP:
                a, gate = a.to(tl.float32), gate.to(tl.float32)
                if GATED:
                    up = up.to(tl.float32)
            gate_acc = tl.dot(a, gate.T, gate_acc, input_precision="ieee")
            if GATED:
                up_acc = tl.dot(a, up.T, up_acc, input_precision="ieee")
        if HAS_BIAS:
            if e < E:
                bias = gate_up_bias + e * (2 if GATED else 1) * WIDTH + n * GATE_STEP
                gate_acc += tl.load(bias, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
                if GATED:
                    up_acc += tl.load(bias + UP_OFFSET, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
        if GATED:
            value = activate(gate_acc, up_acc, ACTIVATION, alpha, limit)
        else:
            value = activate_alone(gate_acc, ACTIVATION)
        wanted = own[:, None] & (n < WIDTH)[None, :]
        to = hidden + slot.to(tl.int64)[:, None] * WIDTH + n[None, :]
        tl.store(to, value.to(hidden.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["n_tokens"])
def down_scan(
    hidden,
    ids,
    down,
    down_bias,
    shared,
    answers,
    n_tokens,
    stride_e,
    stride_n,
    stride_k,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    N_SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UP: tl.constexpr,
    PDL: tl.constexpr,
):
    """`answers[slot] = down hidden[slot]` for one expert's rows and BLOCK_N columns. The ids are two kernels old."""
    e = tl.program_id(1)
    lane, mine, rank, count = own_slots(ids, e, n_tokens, E, K, N_SHARED, SLOTS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if count == 0:
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weight, row = down + e.to(tl.int64) * stride_e, stride_n
    if N_SHARED > 0:
        weight = tl.where(e < E, weight, shared + (e - E) * WIDTH)
        row = tl.where(e < E, row, N_SHARED * WIDTH)
    rows = weight + n.to(tl.int64) * row
    for begin in range(0, count, BLOCK_M):
        found, own = found_rows(mine, rank, lane, begin, count, BLOCK_M)
        slot, _ = slot_and_token(found, e, E, K, N_SHARED)
        source = hidden + slot.to(tl.int64)[:, None] * WIDTH
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            inside = (n < H)[:, None]
            there = own[:, None]
            if WIDTH % BLOCK_K != 0:
                inside = inside & (start + k < WIDTH)[None, :]
                there = there & (start + k < WIDTH)[None, :]
            b = tl.load(rows[:, None] + (start + k)[None, :] * stride_k, mask=inside, other=0.0)
            a = tl.load(source + (start + k)[None, :], mask=there, other=0.0)
            if UP:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        if HAS_BIAS:
            if e < E:
                acc += tl.load(down_bias + e * H + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
        wanted = own[:, None] & (n < H)[None, :]
        tl.store(answers + slot.to(tl.int64)[:, None] * H + n[None, :], acc.to(answers.dtype.element_ty), mask=wanted)
