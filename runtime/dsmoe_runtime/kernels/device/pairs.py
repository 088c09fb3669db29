"""A few tokens: a program per (token, expert) pair and block of columns, matrix times vector, no sort.

T tokens, H hidden size, I expert width, K experts per token. N_SHARED more slots of a token are shared experts: slices
of width I of the shared weights, which every token visits; then stride_k must be 1.
"""

import triton
import triton.language as tl

from dsmoe_runtime.kernels.device.activation import activate, activate_alone


@triton.jit
def in_range(e, E: tl.constexpr):
    """Whether `e`, a scalar or a block (Triton's interpreter takes no scalar for a block's mask), is an expert."""
    return (e >= 0) & (e < E)


@triton.jit(do_not_specialize=["n_tokens", "alpha", "limit"])
def up_pairs(
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """`hidden[t, k] = act(gate x[t], up x[t])`, BLOCK_N columns of one pair. UP_OFFSET 0: `act(gate x[t])`.

    The kernel before is the router's, which itself waited for x: so only what the router writes must be waited for.
    """
    # Shared experts come first and need no ids: they run while the router still works.
    slot = tl.program_id(1)
    if slot < N_SHARED * n_tokens:
        token = (slot // max(N_SHARED, 1)).to(tl.int64)
        k = K + slot % max(N_SHARED, 1)
    else:
        token = ((slot - N_SHARED * n_tokens) // K).to(tl.int64)
        k = (slot - N_SHARED * n_tokens) % K
        if PDL:
            tl.extra.cuda.gdc_wait()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    GATED: tl.constexpr = UP_OFFSET > 0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    if k < K:
        e = tl.load(ids + token * K + k).to(tl.int64)
        if (e < 0) | (e >= E):
            return
        gate_row = gate_up + e * stride_e + n.to(tl.int64) * GATE_STEP * stride_n
        up_row = gate_row + UP_OFFSET * stride_n
    else:
        e = tl.zeros([], tl.int64)
        gate_row = shared + ((k - K) * WIDTH + n).to(tl.int64) * H
        up_row = gate_row + N_SHARED * WIDTH * H
    wanted = n < WIDTH
    gate_sum = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    if GATED:
        up_sum = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, H, BLOCK_K):
        h = start + column
        mask = wanted[:, None] & (h < H)[None, :]
        gate = tl.load(gate_row[:, None] + h[None, :] * stride_k, mask=mask, other=0.0, eviction_policy="evict_first")
        if GATED:
            up = tl.load(up_row[:, None] + h[None, :] * stride_k, mask=mask, other=0.0, eviction_policy="evict_first")
        value = tl.load(x + token * stride_t + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        gate_sum += gate.to(tl.float32) * value
        if GATED:
            up_sum += up.to(tl.float32) * value
    gate_n = tl.sum(gate_sum, 1)
    if GATED:
        up_n = tl.sum(up_sum, 1)
    if HAS_BIAS:
        if k < K:
            bias = gate_up_bias + e * (2 if GATED else 1) * WIDTH + n * GATE_STEP
            gate_n += tl.load(bias, mask=wanted, other=0.0).to(tl.float32)
            if GATED:
                up_n += tl.load(bias + UP_OFFSET, mask=wanted, other=0.0).to(tl.float32)
    if GATED:
        value_n = activate(gate_n, up_n, ACTIVATION, alpha, limit)
    else:
        value_n = activate_alone(gate_n, ACTIVATION)
    tl.store(hidden + (token * (K + N_SHARED) + k) * WIDTH + n, value_n.to(hidden.dtype.element_ty), mask=wanted)


@triton.jit
def down_tokens(
    hidden,
    ids,
    weights,
    down,
    down_bias,
    shared,
    y,
    stride_e,
    stride_n,
    stride_k,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    N_SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """`y[t] = sum_k weights[t, k] down hidden[t, k]`, BLOCK_N columns of one token, all of its experts.

    The first AHEAD experts' weights are asked for before the hidden state is there: ids were written two kernels ago.
    """
    tl.static_assert(AHEAD == 0 or BLOCK_K >= WIDTH, "weights are asked for ahead in one block")
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = n < H
    i = tl.arange(0, BLOCK_K)
    inside = wanted[:, None] & (i < WIDTH)[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    early = ()
    for k in tl.static_range(AHEAD):
        e = tl.load(ids + token * K + k).to(tl.int64)
        row = down + e * stride_e + n.to(tl.int64) * stride_n
        mask = inside & in_range(e + 0 * i, E)[None, :]
        early = early + (  # noqa: RUF005  a tuple of tensors is joined, not unpacked, in a kernel
            tl.load(row[:, None] + i[None, :] * stride_k, mask=mask, other=0.0, eviction_policy="evict_first"),
        )
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for k in tl.static_range(K + N_SHARED):
        pair = token * (K + N_SHARED) + k
        if k < K:
            e = tl.load(ids + token * K + k).to(tl.int64)
            weight = tl.where(in_range(e, E), tl.load(weights + token * K + k).to(tl.float32), 0.0)
            row = down + e * stride_e + n.to(tl.int64) * stride_n
        else:
            e = tl.zeros([], tl.int64)
            weight = 1.0
            row = shared + n.to(tl.int64) * (N_SHARED * WIDTH) + (k - K) * WIDTH
        chosen = in_range(e + 0 * i, E)
        if k < AHEAD:
            value = tl.load(hidden + pair * WIDTH + i, mask=(i < WIDTH) & chosen, other=0.0).to(tl.float32)
            answer = tl.sum(early[k].to(tl.float32) * value[None, :], 1)
        else:
            part = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
            for start in tl.static_range(0, WIDTH, BLOCK_K):
                mask = wanted[:, None] & ((start + i < WIDTH) & chosen)[None, :]
                block = tl.load(
                    row[:, None] + (start + i)[None, :] * stride_k, mask=mask, other=0.0, eviction_policy="evict_first"
                )
                value = tl.load(hidden + pair * WIDTH + start + i, mask=(start + i < WIDTH) & chosen, other=0.0)
                part += block.to(tl.float32) * value.to(tl.float32)[None, :]
            answer = tl.sum(part, 1)
        if HAS_BIAS:
            if k < K:
                answer += tl.load(down_bias + e * H + n, mask=wanted & in_range(e + 0 * n, E), other=0.0).to(tl.float32)
        total += answer * weight
    tl.store(y + token * H + n, total.to(y.dtype.element_ty), mask=wanted)
