"""The routed experts, eq. (9): every expert's feed-forward on the tokens that chose it, weighted and summed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_model.config import ModelConfig
from dsmoe_model.mlp import activation


class RoutedExperts(nn.Module):
    """`gate_up_proj [E, 2I, H]` (gate rows first) and `down_proj [E, H, I]`, the experts stacked.

    Letters: T tokens, H model width, E experts, I expert width, K experts per token. Summed in float32 (float64 for a
    float64 model) by ascending expert, so the same input gives the same bits. An id outside [0, E) matches no expert:
    its slot is skipped.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.n_routed_experts = experts
        self.config = config

    def forward(self, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        acc_dtype = torch.promote_types(x_TH.dtype, torch.float32)
        y_TH = torch.zeros_like(x_TH, dtype=acc_dtype)
        for expert in range(self.n_routed_experts):  # eq. (9): a plain loop, for ever
            token, slot = torch.where(experts_TK == expert)
            gate, up = F.linear(x_TH[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            out = F.linear(activation(gate, up, self.config), self.down_proj[expert])
            y_TH = y_TH.index_add(0, token, out.to(acc_dtype) * weights_TK[token, slot, None])
        return y_TH.to(x_TH.dtype)
