"""Which gate is it? The selection is searched for, then the weights are solved for: a factor, or a factor and a sum.

The operators of a region narrow the search: which scores it computes, and whether before or behind the selection. What
decides is that the operator's rule gives the region's ids on every row, and its weights to 1e-9, in float64.

  w = scale * p                                      not renormalised: w / p is one number
  w = scale * p / (sum p + eps)                      renormalised: w (sum p + eps) / p is one number

A sum that is only kept from zero, `clamp(sum p, min=c)`, becomes a sum with eps 1e-20. It gives the same weights where
the sum is at least c, and 0 where it is 0; between the two, where the scores of all that was chosen have vanished, the
clamp gives weights that no longer sum to 1 and the operator those that do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product

import torch
from torch import Tensor, fx

from dsmoe_passes.gate_probe import PROBE_ROWS, Probe
from dsmoe_passes.gate_region import SCORES, Region
from dsmoe_passes.region import literals, value
from dsmoe_passes.result import Mismatch
from dsmoe_runtime.ops.route import weights_of

aten = torch.ops.aten
TOLERANCE = 1e-9
TINIEST = 1e-20
LARGEST_EPS = 1e-3  # what keeps a sum from zero is less
CLAMPS = {aten.clamp.default, aten.clamp_min.default}
RESHAPING = {aten.view.default, aten.reshape.default, aten.unflatten.int}


@dataclass(frozen=True)
class Gate:
    """The attributes of dsmoe::route, in the order of its schema."""

    top_k: int
    score: str
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"
    renormalize: bool = False
    eps: float = 0.0
    scale: float = 1.0

    def __str__(self) -> str:
        parts = [f"top-{self.top_k} of {self.score}"]
        if self.n_group > 1:
            parts.append(f"{self.topk_group} of {self.n_group} groups by {self.group_score}")
        parts += ["renormalised"] if self.renormalize else []
        parts += [f"x {self.scale:g}"] if self.scale != 1.0 else []
        return ", ".join(parts)


def identify(region: Region, seen: list[Probe]) -> tuple[Gate, torch.dtype]:
    """The gate that gives all that was `seen` of `region`, and the dtype of its scores. Raises: Mismatch."""
    selected = False
    for candidate in _selections(region):
        if not all(_selects(candidate, region, probe) for probe in seen):
            continue
        selected = True
        gate = _weigh(candidate, region, seen[0])
        if gate is not None and all(_weighs(gate, probe) for probe in seen):
            return gate, _score_dtype(region, gate.score)
    raise Mismatch(region.experts, _because(region, selected))


def _selects(gate: Gate, region: Region, seen: Probe) -> bool:
    """Whether `gate` chooses the region's experts, in the region's order if something goes by that."""
    experts = torch.ops.dsmoe.route(seen.logits, seen.bias, *astuple(gate))[1]
    if not region.whole:
        return torch.equal(experts, seen.experts)
    return torch.equal(experts.sort(dim=1).values, seen.experts.sort(dim=1).values)


def _weighs(gate: Gate, seen: Probe) -> bool:
    """Whether `gate` gives the region's weights to the experts that the region chose, unless a clamp does."""
    mine = weights_of(seen.logits, seen.experts, gate.score, gate.renormalize, gate.eps, gate.scale)
    agree = (mine - seen.weights).abs() <= 4 * TOLERANCE * seen.weights.abs()
    return bool(agree[_unclamped(gate, seen)].all())


def _unclamped(gate: Gate, seen: Probe) -> Tensor:
    """The rows on which a sum that is kept from zero is far from it; all rows, where none is."""
    total = weights_of(seen.logits, seen.experts, gate.score, False, 0.0, 1.0).sum(dim=1)
    return total >= (LARGEST_EPS if gate.eps == TINIEST else 0.0)


def _selections(region: Region) -> Iterator[Gate]:
    """Gates that select as the region's operators allow, simplest first."""
    selecting = [node for node in region.inside if node in region.selecting]
    sizes = {size for n in selecting if n.target in RESHAPING for size in literals([n], int)}
    groups = [1, *sorted(g for g in sizes if 1 < g < region.n_experts and region.n_experts % g == 0)]
    counts = sorted(set(literals(selecting, int)))
    for n_group in groups:
        members = region.n_experts // n_group
        kept = [1] if n_group == 1 else [n for n in counts if 1 <= n <= n_group and n * members >= region.top_k]
        by = ["max"] if n_group == 1 or members < 2 else ["max", "top2"]
        for score, topk_group, group_score in product(_scores(region), kept, by):
            yield Gate(region.top_k, score, n_group, topk_group, group_score)


def _scores(region: Region) -> list[str]:
    """The scores that the region may compute: those in front of its selection, or else those behind it."""
    before = [SCORES[n.target] for n in region.inside if n.target in SCORES and n in region.selecting]
    if before:
        return list(dict.fromkeys(before))
    after = {SCORES[n.target] for n in region.inside if n.target in SCORES}
    return ["softmax_after_topk", "softmax"] if "softmax" in after else []


def _weigh(gate: Gate, region: Region, seen: Probe) -> Gate | None:
    """`gate` with the renormalisation and the scale that give the region's weights, or None."""
    plain, weights = weights_of(seen.logits, seen.experts, gate.score, False, 0.0, 1.0), seen.weights
    scale = _constant(weights / plain)
    if scale is not None:
        return replace(gate, scale=scale)
    for eps in _epsilons(region):
        found = replace(gate, renormalize=True, eps=eps)
        scale = _constant((weights * (plain.sum(dim=1, keepdim=True) + eps) / plain)[_unclamped(found, seen)])
        if scale is not None:
            return replace(found, scale=scale)
    return None


def _epsilons(region: Region) -> list[float]:
    """What may be added to a sum, as the region's constants have it."""
    small = [x for x in literals([n for n in region.inside if n.target not in CLAMPS], float) if 0 < x < LARGEST_EPS]
    clamped = any(0 < x < LARGEST_EPS for x in literals([n for n in region.inside if n.target in CLAMPS], float))
    return [*small, *([TINIEST] if clamped else []), 0.0]


def _constant(ratios: Tensor) -> float | None:
    """The one number that all `ratios` are, as short as it can be written, or None."""
    if not len(ratios):
        return None
    middle = ratios.median()
    if not bool(((ratios - middle).abs() <= TOLERANCE * middle.abs()).all()):
        return None
    return float(f"{float(middle):.10g}")


def _score_dtype(region: Region, score: str) -> torch.dtype:
    """The dtype in which the region computes its scores."""
    name = score.removesuffix("_after_topk")
    return next(value(n).dtype for n in region.inside if SCORES.get(n.target) == name)


def _because(region: Region, selected: bool) -> str:
    operators = ", ".join(dict.fromkeys(_name(n) for n in region.inside if "." in str(n.target)))
    on = f"on {PROBE_ROWS} random rows ({operators})"
    if selected:
        return f"a gate of dsmoe::route selects the same experts, but none gives the same weights {on}"
    masks = [n for n in region.selecting if n.target is aten.masked_fill.Scalar and n.args[2] == 0]
    if masks and region.bias is not None:
        return (
            f"experts outside the best groups are masked with 0 ({masks[0].name}), which wins against a negative score "
            "plus bias; dsmoe::route masks with -inf: masked_fill(mask, -inf) would be fused"
        )
    scores = [n for n in region.inside if n.target in SCORES]
    if scores and not any(n in region.selecting for n in scores) and SCORES[scores[0].target] != "softmax":
        name = SCORES[scores[0].target]
        return (
            f"experts are selected by their logits and weighed by {name} ({scores[0].name}); dsmoe::route selects by "
            f"{name} too, which rounds large logits to one score and takes no bias on logits"
        )
    return f"no gate of dsmoe::route gives the same ids and weights {on}"


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1]
