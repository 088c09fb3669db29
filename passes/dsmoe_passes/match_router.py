"""Scores, bias, groups, top-k, renormalisation, scale -> one dsmoe::route.

Before (one of many spellings; everything between the gate's GEMM and what the experts read)
  s_TE       = softmax(logits_TE)
  i_TK       = sort(s_TE, descending)[1][:, :K]
  w_TK       = gather(s_TE, 1, i_TK)
  y_TH       = dsmoe.experts(x_TH, i_TK, w_TK, ...)
After
  w_TK, i_TK = dsmoe.route(logits_TE, bias_E, K, "softmax", n_group, topk_group, group_score, renormalize, eps, scale)
  y_TH       = dsmoe.experts(x_TH, i_TK, w_TK, ...)

The experts say which tensors are the routing, so this pass runs after match_experts. What the region computes is not
read off its operators: they only narrow the candidates (is there a sigmoid, is there a sum to divide by), and a
candidate is taken if it gives the region's ids and weights on 2,048 rows of random logits. Same selection, same
arithmetic in float32.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import product

import torch
from torch import fx

from dsmoe_passes.region import between, call, is_weight, item, literals, run, value
from dsmoe_passes.result import Mismatch, PassResult, Refused, Rewritten, layer_of

aten = torch.ops.aten
PROBE_ROWS = 2048
RENORMALISING = {aten.div.Tensor, aten.softmax.int}


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


@dataclass(frozen=True)
class Match:
    """A gate: what it computes, and the nodes it lies between."""

    gate: Gate
    logits: fx.Node
    bias: fx.Node | None
    weights: fx.Node
    experts: fx.Node


def match_router(gm: fx.GraphModule) -> PassResult:
    """Rewrite the gate in front of every `dsmoe::experts` in `gm`."""
    rewritten, refused = [], []
    for node in list(gm.graph.find_nodes(op="call_function", target=torch.ops.dsmoe.experts.default)):
        if node.args[1].target is operator.getitem and node.args[1].args[0].target is torch.ops.dsmoe.route.default:
            continue
        try:
            found = match(node)
        except Mismatch as no:
            refused.append(Refused(layer_of(node), no.node.name, str(no)))
            continue
        bias = " + selection bias" if found.bias is not None else ""
        rewritten.append(Rewritten(layer_of(found.logits), f"{found.gate}{bias}", "dsmoe::route", found.logits.name))
        rewrite(gm.graph, found)
    gm.graph.eliminate_dead_code()
    return PassResult("match_router", tuple(rewritten), tuple(refused))


def match(node: fx.Node) -> Match:
    """The gate in front of one `dsmoe::experts`. Raises: Mismatch, with the reason that it is no `dsmoe::route`."""
    experts, weights, stacked = node.args[1], node.args[2], node.args[3]
    assert isinstance(experts, fx.Node)
    assert isinstance(weights, fx.Node)
    n_experts, top_k = value(stacked).shape[0], value(experts).shape[1]  # type: ignore[arg-type]
    inside, leaves = between([experts, weights], lambda n: n.target in (aten.linear.default, aten.addmm.default))
    gemms = [n for n in leaves if not is_weight(n)]
    if len(gemms) != 1:
        what = "no GEMM" if not gemms else "the GEMMs " + ", ".join(n.name for n in gemms)
        raise Mismatch(experts, f"the expert ids come from {what}; a gate computes them from the logits of one")
    logits = gemms[0]
    if value(logits).dim() != 2 or value(logits).shape[1] != n_experts:
        raise Mismatch(logits, f"logits must have shape [T, {n_experts}], got {tuple(value(logits).shape)}")
    biases = [n for n in leaves if n is not logits]
    if len(biases) > 1 or any(tuple(value(n).shape) != (n_experts,) or not _is_float(n) for n in biases):
        names = ", ".join(f"{n.name} {tuple(value(n).shape)}" for n in biases)
        raise Mismatch(
            experts, f"beside the logits the gate reads {names}; dsmoe::route takes one bias [{n_experts}] of floats"
        )
    bias = biases[0] if biases else None
    return Match(_identify(inside, logits, bias, weights, experts, n_experts, top_k), logits, bias, weights, experts)


def rewrite(graph: fx.Graph, found: Match) -> None:
    """Put `dsmoe::route` behind the logits, and its outputs in the place of weights and ids."""
    before = max([found.logits] + ([found.bias] if found.bias is not None else [])).next
    args = (found.logits, found.bias, *astuple(found.gate))
    route = call(graph, torch.ops.dsmoe.route.default, args, before=before, like=found.logits)
    for index, old in enumerate((found.weights, found.experts)):
        old.replace_all_uses_with(item(graph, route, index, before=before))


def _identify(
    inside: list[fx.Node],
    logits: fx.Node,
    bias: fx.Node | None,
    weights: fx.Node,
    experts: fx.Node,
    n_experts: int,
    top_k: int,
) -> Gate:
    samples = _samples(inside, logits, bias, weights, experts)
    for gate in _candidates(inside, n_experts, top_k):
        if all(_agrees(gate, *sample) for sample in samples):
            return gate
    operators = ", ".join(dict.fromkeys(str(n.target).split(".")[1] for n in inside if "." in str(n.target)))
    raise Mismatch(
        experts, f"no gate of dsmoe::route gives the same ids and weights on {PROBE_ROWS} random rows ({operators})"
    )


def _samples(
    inside: list[fx.Node], logits: fx.Node, bias: fx.Node | None, weights: fx.Node, experts: fx.Node
) -> list[tuple]:
    """Logits, bias, and the weights and ids that the region gives for them, 2,048 rows at once if it takes so many.

    It does not, if the number of tokens it was traced with is written into it; then it gets that many at a time.
    """

    def sample(rows: int, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        given = {logits: 2 * torch.randn(rows, n_experts, generator=generator, dtype=value(logits).dtype)}
        if bias is not None:
            given[bias] = torch.randn(n_experts, generator=generator, dtype=value(bias).dtype)
        outputs = run(inside, [weights, experts], given, {str(traced): rows})
        if any(output.shape[0] != rows for output in outputs):
            raise RuntimeError(f"{rows} rows in, {outputs[0].shape[0]} out")
        return given[logits], given.get(bias) if bias is not None else None, *outputs

    traced, n_experts = value(logits).shape
    rows = traced if isinstance(traced, int) else int(traced.node.hint)
    if rows == 0:
        raise Mismatch(logits, "the graph was traced without a token: there is nothing to probe its gate with")
    try:
        return [sample(PROBE_ROWS, 0)]
    except RuntimeError:
        return [sample(rows, seed) for seed in range(-(-PROBE_ROWS // rows))]


def _candidates(inside: list[fx.Node], n_experts: int, top_k: int) -> Iterator[Gate]:
    """Gates that the operators in the region allow, simplest first."""
    targets = {node.target for node in inside}
    scores = [score for score, target in SCORES.items() if target in targets]
    sizes = {size for n in inside if n.target in RESHAPING for size in literals([n], int)}
    groups = [1, *sorted(g for g in sizes if 1 < g < n_experts and n_experts % g == 0)]
    eps = [x for x in literals(inside, float) if 0 < x < 1e-3] + [0.0]
    scales = [1.0] + [
        x for x in literals(inside, float) + literals(inside, int) if x not in (0, 1) and abs(x) != float("inf")
    ]
    for n_group in groups:
        limits = [(1, "max")] if n_group == 1 else [*product(range(1, n_group + 1), ("max", "top2"))]
        for score, (topk_group, group_score), scale in product(scores, limits, scales):
            yield Gate(top_k, score, n_group, topk_group, group_score, False, 0.0, float(scale))
            if targets & RENORMALISING:
                for e in eps:
                    yield Gate(top_k, score, n_group, topk_group, group_score, True, e, float(scale))


SCORES = {
    "softmax": aten.softmax.int,
    "sigmoid": aten.sigmoid.default,
    "sqrtsoftplus": aten.softplus.default,
    "softmax_after_topk": aten.softmax.int,
}
RESHAPING = {aten.view.default, aten.reshape.default, aten.unflatten.int}


def _is_float(node: fx.Node) -> bool:
    return value(node).dtype.is_floating_point


def _agrees(
    gate: Gate, logits: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor, experts: torch.Tensor
) -> bool:
    if gate.topk_group * (logits.shape[1] // gate.n_group) < gate.top_k:
        return False
    if gate.group_score == "top2" and logits.shape[1] // gate.n_group < 2:
        return False
    mine_w, mine_i = torch.ops.dsmoe.route(logits, bias, *astuple(gate))
    mine_i, mine_order = mine_i.sort(dim=1)
    its_i, its_order = experts.sort(dim=1)
    if not torch.equal(mine_i, its_i.to(mine_i.dtype)):
        return False
    mine_w, its_w = mine_w.gather(1, mine_order), weights.gather(1, its_order)
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(its_w.dtype).eps)
    return bool(((mine_w - its_w).abs() <= 16 * eps * its_w.abs()).all())
