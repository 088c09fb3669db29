"""The gate: which experts a token goes to, and with what weight. Equations (3)-(5) and (10)-(11), and the successors'.

Letters: T tokens, H model width, E routed experts, K experts per token, G groups.

The paper's gate is softmax over all routed experts, the K best, no renormalisation. The same lines serve GShard (K = 2)
and Switch (K = 1), which the paper writes in this one form, V2 (groups by their best score, scaled) and V3 (sigmoid, a
bias that chooses but never weighs, groups by the sum of their two best, renormalised, scaled).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_model.config import ModelConfig


class Routing(NamedTuple):
    """What a gate decided for T tokens."""

    weights_TK: Tensor  # float32 or wider
    experts_TK: Tensor  # int64, best first, unique in a row, in [0, E) even for a row of NaN
    scores_TE: Tensor  # un-biased scores: softmax, sigmoid, ...; the logits themselves for softmax_after_topk


def best(scores: Tensor, count: int) -> Tensor:
    """Indices `[..., count]` of the largest entries, best first; equal entries: the lowest index first; NaN counts as
    largest. `torch.topk` promises no order among ties, a stable sort does."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]


class Router(nn.Module):
    """`weight [E, H]`: the expert centroids e_i. `e_score_correction_bias [E]` float32 (a buffer), or None.

    float32 throughout (float64 for a float64 model), whatever the activations are; `router_dtype = "activation"` is the
    exception that reproduces the v1 remote code, which rounds logits and scores to bfloat16.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.selection_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.config = config

    def forward(self, x_TH: Tensor, token_ids: Tensor | None = None, experts_TK: Tensor | None = None) -> Routing:
        """`experts_TK` given: these experts are taken as chosen, and only their weights are computed.

        `token_ids` is not read: it is what `HashRouter` routes by.
        """
        config = self.config
        exact = torch.promote_types(x_TH.dtype, torch.float32)
        dtype = exact if config.router_dtype == "float32" else x_TH.dtype
        scores_TE = score(F.linear(x_TH.to(dtype), self.weight.to(dtype)), config.scoring_func)
        if experts_TK is None:
            experts_TK = self.select(scores_TE)
        weights_TK = scores_TE.gather(1, experts_TK)  # un-biased
        if config.scoring_func == "softmax_after_topk":
            weights_TK = weights_TK.softmax(dim=-1)
        if config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + config.norm_eps)
        if config.routed_scaling_factor != 1.0:
            weights_TK = weights_TK * config.routed_scaling_factor
        return Routing(weights_TK.to(exact), experts_TK, scores_TE)

    def select(self, scores_TE: Tensor) -> Tensor:
        """The K experts of each token by score plus bias, among the `topk_group` best groups. `[T, K]` int64."""
        selection_TE = scores_TE
        if self.e_score_correction_bias is not None:
            selection_TE = scores_TE + self.e_score_correction_bias
        if self.config.n_group > 1:
            selection_TE = limit_to_groups(selection_TE, self.config)
        return best(selection_TE, self.config.num_experts_per_tok)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """`model.bfloat16()` must not round the selection bias, which decides near-ties: it stays float32 at least."""
        before: Any = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after is not None and torch.promote_types(after.dtype, torch.float32) != after.dtype:
            self.e_score_correction_bias = before.to(after.device)
        return self


class HashRouter(nn.Module):
    """Hash Layers (arXiv 2106.04426): a fixed table sends each token id to one expert; nothing is learned.

    The weight is 1, as in that paper (the DeepSeekMoE paper does not say). `token_experts [vocab, 1]` int64 is a
    buffer; `Transformer.init_weights` fills it with a seeded, balanced, random assignment. The scores are the table's
    choice: 1 for that expert, 0 for the others.
    """

    token_experts: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("token_experts", torch.zeros(config.vocab_size, 1, dtype=torch.int64))
        self.config = config

    def forward(self, x_TH: Tensor, token_ids: Tensor | None = None, experts_TK: Tensor | None = None) -> Routing:
        """`token_ids [T]` int64 decide, `x_TH` gives the dtype only."""
        if experts_TK is None:
            if token_ids is None:
                raise ValueError("hash routing goes by token ids: pass token_ids along with the activations")
            experts_TK = self.token_experts[token_ids.reshape(-1)]
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        weights_TK = torch.ones_like(experts_TK, dtype=dtype)
        scores_TE = weights_TK.new_zeros(experts_TK.shape[0], self.config.n_routed_experts)
        return Routing(weights_TK, experts_TK, scores_TE.scatter(1, experts_TK, weights_TK))


def score(logits: Tensor, scoring_func: str) -> Tensor:
    """Token-to-expert affinity from the logits; softmax_after_topk weighs only the chosen: the logits themselves."""
    if scoring_func == "softmax":
        return logits.softmax(dim=-1)
    if scoring_func == "sigmoid":
        return logits.sigmoid()
    if scoring_func == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return logits


def limit_to_groups(selection_TE: Tensor, config: ModelConfig) -> Tensor:
    """-inf for every expert outside its token's `topk_group` best groups of E / G neighbours.

    -inf and not 0: with negative biases a masked 0 would win (DeepSeek's own code changed from 0.0 with V3-0324).
    """
    selection_TGE = selection_TE.unflatten(-1, (config.n_group, -1))
    if config.group_score == "max":
        group_TG = selection_TGE.amax(dim=-1)
    else:
        group_TG = selection_TGE.topk(2, dim=-1).values.sum(dim=-1)
    left_out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, best(group_TG, config.topk_group), False)
    return selection_TGE.masked_fill(left_out_TG[..., None], float("-inf")).flatten(1)
