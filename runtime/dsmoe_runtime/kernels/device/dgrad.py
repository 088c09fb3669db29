"""Gradients of an expert's rows: back through a matrix of the expert, and back through its activation.

Rows are slots sorted by expert, as in `kernels.dispatch`: row r belongs to slot slots[r].
"""

import triton
import triton.language as tl

from dsmoe_runtime.kernels.device.activation import activate
from dsmoe_runtime.kernels.device.activation_backward import activate_backward, with_slope
from dsmoe_runtime.kernels.device.rows import tile_of


@triton.jit
def product_tile(
    rows, weight, stride_e, stride_k, stride_n, out, expert, row, stop, first_n,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS_TMA: tl.constexpr, WEIGHT_TMA: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One tile of `through_matrix`: BLOCK_M rows from `row` on, of which those before `stop` are the expert's."""
    r = row + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    own = r < stop
    if not ROWS_TMA:
        source = rows + r.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    if WEIGHT_TMA == "":
        at = weight + expert.to(tl.int64) * stride_e + depth[:, None] * stride_k + n.to(tl.int64)[None, :] * stride_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        if ROWS_TMA:
            a = rows.load([row, k])
        elif DEPTH % BLOCK_K == 0:
            a = tl.load(source + k, mask=own[:, None], other=0.0)
        else:
            a = tl.load(source + k, mask=own[:, None] & (k + depth < DEPTH)[None, :], other=0.0)
        if WEIGHT_TMA == "kn":
            b = tl.reshape(weight.load([expert, k, first_n]), (BLOCK_K, BLOCK_N))
        elif WEIGHT_TMA == "nk":
            b = tl.trans(tl.reshape(weight.load([expert, first_n, k]), (BLOCK_N, BLOCK_K)))
        else:
            b = tl.load(at, mask=(k + depth < DEPTH)[:, None] & (n < WIDTH)[None, :], other=0.0)
            at += BLOCK_K * stride_k
        if UP:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    to = out + r.to(tl.int64)[:, None] * WIDTH + n[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=own[:, None] & (n < WIDTH)[None, :])


@triton.jit
def through_matrix(
    rows, half_rows, weight, stride_e, stride_k, stride_n, offsets, tile_expert, tile_row, tile_count, out,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    ROWS_TMA: tl.constexpr, WEIGHT_TMA: tl.constexpr, UP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out `[P, WIDTH]`: rows `[P, DEPTH]` times the weight `[DEPTH, WIDTH]` of their expert, in any strides.

    ROWS_TMA: rows is a descriptor of blocks `[BLOCK_M, BLOCK_K]`, half_rows one of blocks half as high; else both are
    the table. WEIGHT_TMA: "", or "kn" or "nk" for a descriptor of `[E, DEPTH, WIDTH]` or `[E, WIDTH, DEPTH]`.
    HALF: a tile of which at most half the rows are the expert's is computed at half height.
    """
    N_BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n_tiles = tl.load(tile_count)
    if tl.program_id(0) >= n_tiles * N_BLOCKS:
        return
    tile, block = tile_of(tl.program_id(0), n_tiles, N_BLOCKS, GROUP)
    expert = tl.load(tile_expert + tile)
    row = tl.load(tile_row + tile)
    stop = tl.load(offsets + expert + 1)
    if HALF and stop - row <= BLOCK_M // 2:
        product_tile(
            half_rows, weight, stride_e, stride_k, stride_n, out, expert, row, stop, block * BLOCK_N,
            DEPTH, WIDTH, BLOCK_M // 2, BLOCK_N, BLOCK_K, ROWS_TMA, WEIGHT_TMA, UP,
        )  # fmt: skip
    else:
        product_tile(
            rows, weight, stride_e, stride_k, stride_n, out, expert, row, stop, block * BLOCK_N,
            DEPTH, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, ROWS_TMA, WEIGHT_TMA, UP,
        )  # fmt: skip


@triton.jit
def through_activation(
    grad_hidden, joint, weights, slots, offsets, grad_joint, products, alpha, limit,
    WIDTH: tl.constexpr, EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, KEEP_HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """From grad_hidden `[P, WIDTH]`, not yet weighted, and joint `[P, 2 WIDTH]` to grad_joint; a program for ROWS rows.

    products `[P]` float32: `<grad_hidden, hidden>`, the gradient of a routing weight but for a bias of down.
    KEEP_HIDDEN: the weighted hidden state, which down's gradient wants, is written over grad_hidden. Not GATED: joint
    and grad_joint are `[P, WIDTH]`, of one projection.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < tl.load(offsets + EXPERTS)
    scale = tl.load(weights + tl.load(slots + rows, mask=real, other=0), mask=real, other=0.0).to(tl.float32)
    first = rows.to(tl.int64)[:, None] * WIDTH
    dtype = grad_joint.dtype.element_ty
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = real[:, None] & (columns < WIDTH)[None, :]
        if not GATED:
            at = first + columns[None, :]
            gate = tl.load(joint + at, mask=inside, other=0.0)
        elif INTERLEAVED:
            pairs = 2 * start + tl.arange(0, 2 * BLOCK)
            at_pairs = 2 * first + pairs[None, :]
            inside_pairs = real[:, None] & (pairs < 2 * WIDTH)[None, :]
            both = tl.load(joint + at_pairs, mask=inside_pairs, other=0.0)
            gate, up = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
        else:
            at = 2 * first + columns[None, :]
            gate = tl.load(joint + at, mask=inside, other=0.0)
            up = tl.load(joint + WIDTH + at, mask=inside, other=0.0)
        grad = tl.load(grad_hidden + first + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if GATED:
            gate, up = gate.to(tl.float32), up.to(tl.float32)
            hidden = activate(gate, up, ACTIVATION, alpha, limit)
            grad_gate, grad_up = activate_backward(grad * scale[:, None], gate, up, ACTIVATION, alpha, limit)
        else:
            hidden, slope = with_slope(gate.to(tl.float32), ACTIVATION)
            grad_gate = grad * scale[:, None] * slope
        sums += grad * hidden
        if not GATED:
            tl.store(grad_joint + at, grad_gate.to(dtype), mask=inside)
        elif INTERLEAVED:
            both = tl.reshape(tl.join(grad_gate.to(dtype), grad_up.to(dtype)), (ROWS, 2 * BLOCK))
            tl.store(grad_joint + at_pairs, both, mask=inside_pairs)
        else:
            tl.store(grad_joint + at, grad_gate.to(dtype), mask=inside)
            tl.store(grad_joint + WIDTH + at, grad_up.to(dtype), mask=inside)
        if KEEP_HIDDEN:
            tl.store(grad_hidden + first + columns[None, :], (hidden * scale[:, None]).to(dtype), mask=inside)
    tl.store(products + rows, tl.sum(sums, 1), mask=real)
