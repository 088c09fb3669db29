"""Gradients of the gated activations of `ops.activation`, in float32 registers."""

import triton
import triton.language as tl


@triton.jit
def activate_backward(grad, gate, up, ACTIVATION: tl.constexpr, alpha, limit):
    """Gradients of gate and up, given that of `activate`'s result; a clamped value passes none, its bounds do."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
    clamped_gate = tl.minimum(gate, limit)
    clamped_up = tl.minimum(tl.maximum(up, -limit), limit)
    if ACTIVATION == "silu_clamped":
        sigmoid = tl.sigmoid(clamped_gate)
        grad_gate = grad * clamped_up * sigmoid * (1 + clamped_gate * (1 - sigmoid))
    else:
        sigmoid = tl.sigmoid(alpha * clamped_gate)
        grad_gate = grad * (clamped_up + 1) * sigmoid * (1 + alpha * clamped_gate * (1 - sigmoid))
    grad_up = grad * clamped_gate * sigmoid
    return tl.where(gate > limit, 0.0, grad_gate), tl.where(tl.abs(up) > limit, 0.0, grad_up)
