"""The activations of `ops.activation`, in float32 registers."""

import triton
import triton.language as tl


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, alpha, limit):
    """The hidden state from its two projections, any shape: one of `ops.activation.ACTIVATIONS`."""
    if ACTIVATION != "silu_clamped" and ACTIVATION != "swiglu_oai":
        return activate_alone(gate, ACTIVATION) * up
    alpha, limit = tl.cast(alpha, tl.float32), tl.cast(limit, tl.float32)  # float64 from a compiled graph
    gate, up = clamped(gate, up, limit)
    if ACTIVATION == "silu_clamped":
        return gate * tl.sigmoid(gate) * up
    return (up + 1) * (gate * tl.sigmoid(alpha * gate))


@triton.jit
def clamped(gate, up, limit):
    """Gate from above, up from both sides; NaN stays NaN."""
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL), up


@triton.jit
def activate_alone(x, ACTIVATION: tl.constexpr):
    """The same of one projection, where nothing gates: one of `ops.activation.UNGATED`."""
    if ACTIVATION == "gelu":
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(tanh_argument(x))
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # NaN stays, which maximum() drops
    if ACTIVATION == "relu2":
        positive = tl.where(x < 0, 0.0, x)
        return positive * positive
    return x * tl.sigmoid(x)


@triton.jit
def tanh_argument(x):
    """Twice what gelu_tanh takes the tanh of: (1 + tanh z) / 2 is sigmoid(2 z), which neither overflows nor cancels."""
    return x * (1.5957691216057308 + 0.07135481627260025 * x * x)
