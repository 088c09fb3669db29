"""The mixture-of-experts layer, eq. (9)-(11): shared experts always, routed experts by the gate."""

from __future__ import annotations

from torch import Tensor, nn

from dsmoe_model.config import ModelConfig
from dsmoe_model.experts import RoutedExperts
from dsmoe_model.mlp import MLP
from dsmoe_model.router import HashRouter, Router, Routing


class MoE(nn.Module):
    """`x [B, S, H]` -> `(y [B, S, H], Routing)`. The residual and the norm are the block's, not this layer's.

    Shared experts carry no gate: their coefficient is exactly 1. Without routed experts (`n_routed_experts = 0`) the
    layer is its shared experts alone, the paper's Dense x4 and x16, and the routing is None.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router: Router | HashRouter | None = None
        self.experts: RoutedExperts | None = None
        self.shared_experts: MLP | None = None
        if config.n_routed_experts:
            self.router = HashRouter(config) if config.hash_routing else Router(config)
            self.experts = RoutedExperts(config)
        if config.n_shared_experts:
            self.shared_experts = MLP(config, config.shared_intermediate_size)

    def forward(
        self, x_BSH: Tensor, token_ids: Tensor | None = None, experts_TK: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """`token_ids [B, S]` is read by hash routing; `experts_TK [B*S, K]` forces the choice of experts."""
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        if self.router is None or self.experts is None:
            assert self.shared_experts is not None
            return self.shared_experts(x_TH).reshape(x_BSH.shape), None
        routing = self.router(x_TH, token_ids, experts_TK)
        y_TH = self.experts(x_TH, routing.weights_TK, routing.experts_TK)
        if self.shared_experts is not None:
            y_TH = y_TH + self.shared_experts(x_TH)
        return y_TH.reshape(x_BSH.shape), routing
