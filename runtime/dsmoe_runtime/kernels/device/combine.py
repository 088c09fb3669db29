"""Each token's answers, weighted and summed in the order of its experts; and the gather of rows in sorted order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_tokens"])
def combine(
    answers,
    ids,
    weights,
    extra,
    y,
    n_tokens,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    N_SHARED: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """`y[t] = sum_k weights[t, k] answers[t, k]`, then the shared answers and `extra[t]`; float32, in that order."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < H
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for k in tl.static_range(K + N_SHARED):
        row = token * (K + N_SHARED) + k
        if k < K:
            e = tl.load(ids + token * K + k)
            owner = e + 0 * column
            chosen = (owner >= 0) & (owner < E)
            answer = tl.load(answers + row * H + column, mask=inside & chosen, other=0.0).to(tl.float32)
            weight = tl.load(weights + token * K + k).to(tl.float32)
            total += answer * tl.where(chosen, weight, 0.0)
        else:
            total += tl.load(answers + row * H + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_EXTRA:
        total += tl.load(extra + token * H + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * H + column, total.to(y.dtype.element_ty), mask=inside)
