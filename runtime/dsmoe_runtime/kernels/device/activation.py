"""The gated activations of `ops.activation`, in float32 registers."""

import triton
import triton.language as tl


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, alpha, limit):
    """The hidden state from its two projections, any shape: silu | silu_clamped | swiglu_oai."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    alpha, limit = tl.cast(alpha, tl.float32), tl.cast(limit, tl.float32)  # float64 from a compiled graph
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    if ACTIVATION == "silu_clamped":
        return gate * tl.sigmoid(gate) * up
    return (up + 1) * (gate * tl.sigmoid(alpha * gate))
