"""From logits in registers to the experts of each token and their weights; the kernel that does it to stored logits.

T tokens, E experts in G groups of M, K per token. A tile has BLOCK_T rows and G' x M' columns: groups and members are
padded to powers of two, so that a group is a row of `[BLOCK_T, G', M']` whatever E is. Column c is expert
(c // M') * M + c % M'; the columns of no expert rank below everything and are never chosen.

A column's rank is one int64: the score's bits in an order that integers have (-0.0 is 0.0, NaN above inf), then the
column, lowest first. One maximum is then both the best score and its lowest index.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-(2**63))  # the rank of no expert, and of one already chosen
NAN = tl.constexpr(0x7FFFFFFF)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
MINUS_INFINITY = tl.constexpr(-2139095041 * 2**32)
COLUMN = tl.constexpr(0xFFFF)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` (float32) as the torch rule has it after each of its operations: rounded to the logits' dtype."""
    if dtype == tl.bfloat16:  # to the nearest, ties to even; Triton's interpreter would truncate
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x != x, x, bits.to(tl.float32, bitcast=True))
    return x.to(dtype).to(tl.float32)


@triton.jit
def exponential(x):
    """exp to the last bits (`tl.exp` loses one for each power of two of x): 2^n e^r with |r| <= ln(2) / 2."""
    x = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))  # NaN stays
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    return tl.exp2(n) * tl.exp2(r * 1.4426950408889634)


@triton.jit
def scores_of(logits, valid, SCORE: tl.constexpr, dtype: tl.constexpr):
    """Scores `[BLOCK_T, C]`, float32 rounded to `dtype` where torch rounds. Any outside `valid`."""
    if SCORE == "softmax":
        logits = tl.where(valid, logits, float("-inf"))
        powers = exponential(logits - tl.max(logits, 1)[:, None])  # a row of -inf, or with inf, is NaN, as in torch
        return rounded(tl.div_rn(powers, tl.broadcast_to(tl.sum(powers, 1)[:, None], powers.shape)), dtype)
    if SCORE == "sigmoid":
        return rounded(tl.div_rn(tl.full(logits.shape, 1.0, tl.float32), 1.0 + exponential(-logits)), dtype)
    if SCORE == "sqrtsoftplus":
        power = exponential(logits)
        total = 1.0 + power  # log1p(power) = log(total) corrected for what `total` lost
        correction = tl.div_rn(power, tl.where(total == 1.0, 1.0, total - 1.0))
        softplus = tl.where(total == 1.0, power, tl.log(total) * correction)
        return rounded(tl.sqrt_rn(rounded(tl.where(logits > 20.0, logits, softplus), dtype)), dtype)
    return logits


@triton.jit
def ordered(x):
    """int32 in the order of float32: -0.0 equals 0.0, NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, NAN, tl.where(bits < 0, bits ^ MAGNITUDE, bits))


@triton.jit
def value_of(rank):
    """The float32 in an int64 rank."""
    bits = (rank >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ MAGNITUDE, bits).to(tl.float32, bitcast=True)


@triton.jit
def drop_groups(
    ranks,
    BLOCK_T: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_MEMBERS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP2: tl.constexpr,
    dtype: tl.constexpr,
):
    """`ranks` with the experts outside the TOPK_GROUP best groups as if they scored -inf."""
    ranks = tl.reshape(ranks, (BLOCK_T, PADDED_GROUPS, PADDED_MEMBERS))
    best = tl.max(ranks, 2)
    if TOP2:
        second = tl.max(tl.where(ranks == best[:, :, None], LEAST, ranks), 2)
        score = ordered(rounded(value_of(best) + value_of(second), dtype)).to(tl.int64)
    else:
        score = best >> 32
    group = tl.arange(0, PADDED_GROUPS)[None, :]
    groups = tl.where(group < GROUPS, (score << 32) | (group ^ COLUMN), LEAST)
    for _ in range(TOPK_GROUP):
        groups = tl.where(groups == tl.max(groups, 1)[:, None], LEAST, groups)
    kept = (groups == LEAST)[:, :, None] | (ranks == LEAST)
    ranks = tl.where(kept, ranks, (ranks & COLUMN) | MINUS_INFINITY)
    return tl.reshape(ranks, (BLOCK_T, PADDED_GROUPS * PADDED_MEMBERS))


@triton.jit
def expert_of(column, MEMBERS: tl.constexpr, PADDED_MEMBERS: tl.constexpr):
    """The expert of a column; valid where `column % PADDED_MEMBERS < MEMBERS` and the expert is below E."""
    return (column // PADDED_MEMBERS) * MEMBERS + column % PADDED_MEMBERS


@triton.jit
def choose(
    logits,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    token,
    T,
    eps,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_MEMBERS: tl.constexpr,
    PADDED_K: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP2: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BIASED: tl.constexpr,
    dtype: tl.constexpr,
):
    """Select and weigh: `logits` (float32 values of `dtype`) `[BLOCK_T, C]` to rows `token` of weights and experts."""
    MEMBERS: tl.constexpr = E // GROUPS
    column = tl.arange(0, PADDED_GROUPS * PADDED_MEMBERS)
    expert = expert_of(column, MEMBERS, PADDED_MEMBERS)
    valid = ((column % PADDED_MEMBERS < MEMBERS) & (expert < E))[None, :]
    scores = scores_of(logits, valid, SCORE, dtype)
    selection = scores
    selection_dtype: tl.constexpr = (
        tl.float32 if BIASED and bias_ptr.dtype.element_ty != dtype else dtype
    )  # as promoted
    if BIASED:
        bias = tl.load(bias_ptr + expert, mask=(column % PADDED_MEMBERS < MEMBERS) & (expert < E), other=0.0)
        selection = rounded(scores + bias.to(tl.float32)[None, :], selection_dtype)
    ranks = (ordered(selection).to(tl.int64) << 32) | (column ^ COLUMN)[None, :]
    ranks = tl.where(valid, ranks, LEAST)
    if TOPK_GROUP < GROUPS:
        ranks = drop_groups(ranks, BLOCK_T, GROUPS, PADDED_GROUPS, PADDED_MEMBERS, TOPK_GROUP, TOP2, selection_dtype)

    place = tl.arange(0, PADDED_K)[None, :]
    chosen = tl.zeros([BLOCK_T, PADDED_K], tl.int32)  # columns
    for k in range(K):
        top = tl.max(ranks, 1)[:, None]
        chosen = tl.where(place == k, ((top & COLUMN) ^ COLUMN).to(tl.int32), chosen)
        ranks = tl.where(ranks == top, LEAST, ranks)

    weights = tl.gather(scores, chosen, 1)
    if SCORE == "softmax_after_topk":
        weights = tl.where(place < K, weights, float("-inf"))
        weights = exponential(weights - tl.max(weights, 1)[:, None])
        weights = rounded(tl.div_rn(weights, tl.broadcast_to(tl.sum(weights, 1)[:, None], weights.shape)), dtype)
    if RENORMALIZE:
        total = rounded(tl.sum(tl.where(place < K, weights, 0.0), 1), dtype)
        total = rounded(total + eps, dtype)
        weights = rounded(tl.div_rn(weights, tl.broadcast_to(total[:, None], weights.shape)), dtype)
    weights = rounded(weights * scale, dtype)

    slot = token.to(tl.int64)[:, None] * K + place
    written = (token < T)[:, None] & (place < K)
    tl.store(weights_ptr + slot, weights, mask=written)
    tl.store(experts_ptr + slot, expert_of(chosen, MEMBERS, PADDED_MEMBERS).to(tl.int64), mask=written)


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    logits_ptr,
    router_bias_ptr,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    T,
    eps,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_MEMBERS: tl.constexpr,
    PADDED_K: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP2: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROUTER_BIASED: tl.constexpr,
    BIASED: tl.constexpr,
    DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """Select from stored logits `[PARTS, T, E]`: the sum of PARTS, plus the router's bias, rounded to DTYPE."""
    dtype: tl.constexpr = tl.bfloat16 if DTYPE == "bfloat16" else (tl.float16 if DTYPE == "float16" else tl.float32)
    MEMBERS: tl.constexpr = E // GROUPS
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, PADDED_GROUPS * PADDED_MEMBERS)
    expert = expert_of(column, MEMBERS, PADDED_MEMBERS)
    valid = (column % PADDED_MEMBERS < MEMBERS) & (expert < E)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    cell = token.to(tl.int64)[:, None] * E + expert[None, :]
    held = (token < T)[:, None] & valid[None, :]
    if PARTS == 1:
        logits = tl.load(logits_ptr + cell, mask=held, other=0.0).to(tl.float32)
    else:
        part = tl.arange(0, PADDED_PARTS)[:, None, None]
        cells = part.to(tl.int64) * (tl.cast(T, tl.int64) * E) + cell[None, :, :]
        logits = tl.sum(tl.load(logits_ptr + cells, mask=held[None, :, :] & (part < PARTS), other=0.0), 0)
    if ROUTER_BIASED:
        router_bias = tl.load(router_bias_ptr + expert, mask=valid, other=0.0).to(tl.float32)
        logits += rounded(router_bias, dtype)[None, :]
    logits = rounded(logits, dtype)
    choose(
        logits,
        bias_ptr,
        weights_ptr,
        experts_ptr,
        token,
        T,
        eps,
        scale,
        E,
        K,
        BLOCK_T,
        GROUPS,
        PADDED_GROUPS,
        PADDED_MEMBERS,
        PADDED_K,
        TOPK_GROUP,
        TOP2,
        SCORE,
        RENORMALIZE,
        BIASED,
        dtype,
    )
