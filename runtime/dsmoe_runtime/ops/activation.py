"""The gated activations of an expert, forward and backward, on gate and up of any shape.

silu          silu(g) * u                                             SwiGLU, DeepSeekMoE's released code
silu_clamped  silu(min(g, limit)) * clamp(u, -limit, limit)           DeepSeek-V4 in transformers
swiglu_oai    (clamp(u, -limit, limit) + 1) * g' * sigmoid(alpha g'),  g' = min(g, limit)      gpt-oss
"""

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("silu", "silu_clamped", "swiglu_oai")


def activate(gate: Tensor, up: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
    """The hidden state of an expert from its two projections, in their dtype."""
    if activation == "silu":
        return F.silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "silu_clamped":
        return F.silu(gate) * up
    return (up + 1) * (gate * (alpha * gate).sigmoid())


def activate_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, given that of `activate`'s result; a clamped value passes none, its bounds do."""
    slope = alpha if activation == "swiglu_oai" else 1.0
    shift = 1.0 if activation == "swiglu_oai" else 0.0
    g, u = gate, up
    if activation != "silu":
        g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = (slope * g).sigmoid()
    grad_gate = grad * (u + shift) * sigmoid * (1 + slope * g * (1 - sigmoid))
    grad_up = grad * g * sigmoid
    if activation != "silu":
        grad_gate = grad_gate.masked_fill(gate > limit, 0)
        grad_up = grad_up.masked_fill(up.abs() > limit, 0)
    return grad_gate, grad_up
