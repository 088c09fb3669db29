"""Gradients of the activations of `ops.activation`, in float32 registers."""

import triton
import triton.language as tl

from dsmoe_runtime.kernels.device.activation import clamped, tanh_argument


@triton.jit
def activate_backward(grad, gate, up, ACTIVATION: tl.constexpr, alpha, limit):
    """Gradients of gate and up, given that of `activate`'s result; a clamped value passes none, its bounds do."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
    if ACTIVATION != "silu_clamped" and ACTIVATION != "swiglu_oai":
        hidden, slope = with_slope(gate, ACTIVATION)
        return grad * up * slope, grad * hidden
    clamped_gate, clamped_up = clamped(gate, up, limit)
    if ACTIVATION == "silu_clamped":
        sigmoid = tl.sigmoid(clamped_gate)
        grad_gate = grad * clamped_up * sigmoid * (1 + clamped_gate * (1 - sigmoid))
    else:
        sigmoid = tl.sigmoid(alpha * clamped_gate)
        grad_gate = grad * (clamped_up + 1) * sigmoid * (1 + alpha * clamped_gate * (1 - sigmoid))
    grad_up = grad * clamped_gate * sigmoid
    return tl.where(gate > limit, 0.0, grad_gate), tl.where(tl.abs(up) > limit, 0.0, grad_up)


@triton.jit
def with_slope(x, ACTIVATION: tl.constexpr):
    """What `activate_alone` gives, and its derivative; that of relu at 0 is 0."""
    if ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if ACTIVATION == "gelu_tanh":
        sigmoid = tl.sigmoid(tanh_argument(x))
        inner = 1.5957691216057308 + 0.21406444881780076 * x * x
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid) * inner)
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    if ACTIVATION == "relu2":
        positive = tl.where(x < 0, 0.0, x)
        return positive * positive, 2 * positive
    sigmoid = tl.sigmoid(x)
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
