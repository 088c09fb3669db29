"""The activations of an expert, forward and backward: of gate and up, or of one projection where nothing gates.

silu          silu(g) * u                                             SwiGLU, DeepSeekMoE's released code
silu_clamped  silu(min(g, limit)) * clamp(u, -limit, limit)           DeepSeek-V4 in transformers
swiglu_oai    (clamp(u, -limit, limit) + 1) * g' * sigmoid(alpha g'),  g' = min(g, limit)      gpt-oss
gelu          g * Phi(g) * u, by erf
gelu_tanh     g * (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) / 2 * u   Gemma 4
relu          max(g, 0) * u
relu2         max(g, 0)^2 * u                                         Nemotron-H, ungated

Ungated, there is no u (None) and no product with it; the two that clamp both need both.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmoe_runtime.errors import ConfigError

ACTIVATIONS = ("silu", "silu_clamped", "swiglu_oai", "gelu", "gelu_tanh", "relu", "relu2")
UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
CUBIC = 0.044715  # of gelu_tanh


def check_activation(activation: str, layout: str) -> None:
    """Refuse an activation that does not exist, or that the layout leaves without its second operand."""
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if not has_gate(layout) and activation not in UNGATED:
        raise ConfigError(
            f"activation is {activation!r}, which wants gate and up, and layout {layout!r} has one projection; "
            f"there it must be one of {', '.join(UNGATED)}"
        )


def has_gate(layout: str) -> bool:
    """Whether experts in this layout have a gate beside up: else `gate_up` is one projection, I wide."""
    return not layout.startswith("ungated")


def halves(joint: Tensor, layout: str) -> tuple[Tensor, Tensor | None]:
    """Gate and up, views of joint `[..., 2I]`; joint `[..., I]` itself and None where nothing gates."""
    if not has_gate(layout):
        return joint, None
    if layout.startswith("interleaved"):
        return joint[..., 0::2], joint[..., 1::2]
    width = joint.shape[-1] // 2
    return joint[..., :width], joint[..., width:]


def joined(gate: Tensor, up: Tensor | None, layout: str) -> Tensor:
    """The inverse of `halves`."""
    if up is None:
        return gate
    if layout.startswith("interleaved"):
        return torch.stack((gate, up), dim=-1).flatten(-2)
    return torch.cat((gate, up), dim=-1)


def activate(gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float) -> Tensor:
    """The hidden state of an expert from its two projections, or from its one (up None), in their dtype."""
    if activation in ("silu_clamped", "swiglu_oai"):
        assert up is not None, activation
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if activation == "swiglu_oai":
            return (up + 1) * (gate * (alpha * gate).sigmoid())
    hidden = _pointwise(gate, activation)
    return hidden if up is None else hidden * up


def _pointwise(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    if activation == "relu2":
        return F.relu(x).square()
    return F.silu(x)


def activate_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate and up, given that of `activate`'s result; a clamped value passes none, its bounds do."""
    if activation not in ("silu_clamped", "swiglu_oai"):
        hidden, slope = _with_slope(gate, activation)
        return (grad * slope, None) if up is None else (grad * up * slope, grad * hidden)
    assert up is not None, activation
    steep, shift = (alpha, 1.0) if activation == "swiglu_oai" else (1.0, 0.0)
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = (steep * g).sigmoid()
    grad_gate = grad * (u + shift) * sigmoid * (1 + steep * g * (1 - sigmoid))
    grad_up = grad * g * sigmoid
    return grad_gate.masked_fill(gate > limit, 0), grad_up.masked_fill(up.abs() > limit, 0)


def _with_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """What `_pointwise` gives, and its derivative; that of relu at 0 is 0."""
    if activation == "relu":
        return F.relu(x), (x > 0).to(x.dtype)
    if activation == "relu2":
        hidden = F.relu(x)
        return hidden.square(), 2 * hidden
    if activation == "gelu":
        below = 0.5 * (1 + (x * math.sqrt(0.5)).erf())
        return x * below, below + x * (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":  # (1 + tanh z) / 2 is sigmoid(2 z)
        outer = 2 * math.sqrt(2 / math.pi)
        sigmoid = (outer * (x + CUBIC * x * x * x)).sigmoid()
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid) * outer * (1 + 3 * CUBIC * x * x))
    sigmoid = x.sigmoid()
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
