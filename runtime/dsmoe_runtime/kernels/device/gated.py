"""The activation of a dense gated MLP: rows of gate and up, side by side, to rows of the hidden state."""

import triton
import triton.language as tl

from dsmoe_runtime.kernels.device.activation import activate


@triton.jit(do_not_specialize=["alpha", "limit"])
def gated(
    joint, hidden, alpha, limit, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """`hidden [T, S]` = act of `joint [T, 2S]`, the gate's columns first; a program for BLOCK columns of a token."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(joint + token * (2 * WIDTH) + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(joint + token * (2 * WIDTH) + WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    value = activate(gate, up, ACTIVATION, alpha, limit).to(hidden.dtype.element_ty)
    tl.store(hidden + token * WIDTH + column, value, mask=column < WIDTH)
