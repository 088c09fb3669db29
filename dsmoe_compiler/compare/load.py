"""Expert load: how often each expert of each layer was chosen, and how evenly.

L MoE layers, T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dsmoe_model.moe import MoE
from dsmoe_model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """Load of one layer. `entropy` is H / ln E (1 = even, 0 = one expert), `gini` 0 = even, towards 1 = one expert."""

    name: str
    counts: tuple[int, ...]
    distinct: int
    entropy: float
    gini: float
    hottest: int
    hottest_share: float


def routed_layers(model: Transformer) -> dict[str, MoE]:
    """The layers that route, by their names in the model, in order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MoE) and layer.router is not None}


def expert_load(experts_LTK: Tensor, names: list[str], *, n_experts: int) -> tuple[LayerLoad, ...]:
    """Count the choices in `experts_LTK` (int64; ids outside [0, E) are skipped slots) -> one LayerLoad per layer."""
    if len(names) != experts_LTK.shape[0]:
        raise ValueError(f"{len(names)} layer names for routing of {experts_LTK.shape[0]} layers")
    return tuple(
        _layer_load(name, tuple(_histogram(chosen_TK, n_experts)))
        for name, chosen_TK in zip(names, experts_LTK.cpu(), strict=True)
    )


def distinct_experts(experts_LTK: Tensor, *, n_experts: int) -> tuple[int, ...]:
    """How many different experts each layer read: the weights that had to move, whatever the kernel."""
    return tuple(sum(count > 0 for count in _histogram(chosen_TK, n_experts)) for chosen_TK in experts_LTK.cpu())


def _histogram(chosen_TK: Tensor, n_experts: int) -> list[int]:
    ids = chosen_TK.reshape(-1)
    return ids[(ids >= 0) & (ids < n_experts)].bincount(minlength=n_experts).tolist()


def _layer_load(name: str, counts: tuple[int, ...]) -> LayerLoad:
    total, n_experts = sum(counts), len(counts)
    shares = [count / total for count in counts] if total else [0.0] * n_experts
    entropy = -sum(share * math.log(share) for share in shares if share) / math.log(n_experts) if n_experts > 1 else 1.0
    weighted = sum((rank + 1) * share for rank, share in enumerate(sorted(shares)))
    gini = 2 * weighted / n_experts - (n_experts + 1) / n_experts if total else 0.0
    hottest = max(range(n_experts), key=counts.__getitem__)
    return LayerLoad(
        name=name,
        counts=counts,
        distinct=sum(count > 0 for count in counts),
        entropy=max(0.0, entropy),
        gini=max(0.0, gini),
        hottest=hottest,
        hottest_share=shares[hottest],
    )
