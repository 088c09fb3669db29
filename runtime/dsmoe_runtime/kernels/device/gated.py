"""The activation of a dense MLP: from rows of gate and up, side by side, or of one projection, to its hidden state."""

import triton
import triton.language as tl

from dsmoe_runtime.kernels.device.activation import activate, activate_alone


@triton.jit(do_not_specialize=["alpha", "limit"])
def gated(
    joint, hidden, alpha, limit,
    WIDTH: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`hidden [T, S]` = act of `joint [T, 2S]`, the gate's columns first; a program for BLOCK columns of a token.

    Not GATED: of `joint [T, S]`.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = joint + token * ((2 if GATED else 1) * WIDTH)
    gate = tl.load(first + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(first + WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        value = activate(gate, up, ACTIVATION, alpha, limit)
    else:
        value = activate_alone(gate, ACTIVATION)
    tl.store(hidden + token * WIDTH + column, value.to(hidden.dtype.element_ty), mask=column < WIDTH)
