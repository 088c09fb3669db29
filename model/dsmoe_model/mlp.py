"""The gated feed-forward: dense layers, and the shared experts as one of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_model.config import ModelConfig


def activation(gate: Tensor, up: Tensor, config: ModelConfig) -> Tensor:
    """The gated unit between the up and the down projection, element by element; `gate` and `up` share a shape.

    "silu"          silu(g) u                                              DeepSeek, Llama (SwiGLU)
    "silu_clamped"  silu(min(g, limit)) clamp(u, -limit, limit)            DeepSeek-V4
    "swiglu_oai"    (clamp(u, -limit, limit) + 1) g' sigmoid(alpha g'), g' = min(g, limit)    gpt-oss
    """
    if config.hidden_act == "silu":
        return F.silu(gate) * up
    limit = config.swiglu_limit
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if config.hidden_act == "silu_clamped":
        return F.silu(gate) * up
    return (up + 1) * (gate * torch.sigmoid(config.swiglu_alpha * gate))


class MLP(nn.Module):
    """`x [..., H]` -> `down(activation(gate(x), up(x)))` `[..., H]`, without biases."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(activation(self.gate_proj(x), self.up_proj(x), self.config))
