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
read off its operators: `gate_probe` runs it, `gate_identify` finds the gate that gives the same. Each kind of region is
identified once, however many layers have it. In-place operations are rewritten first (`functionalise`): a region is
run on its own, so nothing in it may be overwritten from outside.

Scores are computed in the dtype in which the graph computes them (the logits are cast to it where they are in another),
so the selection is the same; of equal scores the lowest expert is chosen. Weights stay in the operator's float32 on
their way to the experts: rounding them to the activation's dtype in between, as some gates do, is left out.
"""

from __future__ import annotations

import operator
from dataclasses import astuple, dataclass

import torch
from torch import fx

from dsmoe_passes.functionalise import functionalise
from dsmoe_passes.gate_identify import Gate, identify
from dsmoe_passes.gate_probe import probe
from dsmoe_passes.gate_region import Region, regions
from dsmoe_passes.region import call, item, value
from dsmoe_passes.result import Mismatch, PassResult, Refused, Rewritten, layer_of

aten = torch.ops.aten
Known = dict[tuple, tuple[Gate, torch.dtype] | str]


@dataclass(frozen=True)
class Match:
    """A gate: what it computes, in which dtype it scores, and the nodes it lies between."""

    gate: Gate
    dtype: torch.dtype
    logits: fx.Node
    bias: fx.Node | None
    weights: fx.Node
    experts: fx.Node


def match_router(gm: fx.GraphModule) -> PassResult:
    """Rewrite the gate in front of every `dsmoe::experts` in `gm`."""
    rewritten, refused = [], []
    known: Known = {}
    functionalise(gm)
    for node in gm.graph.find_nodes(op="call_function", target=aten.type_as.default):
        node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": value(node).dtype}
    for node in list(gm.graph.find_nodes(op="call_function", target=torch.ops.dsmoe.experts.default)):
        if _is_routed(node.args[1]):
            continue
        try:
            found = match(node, known)
        except Mismatch as no:
            refused.append(Refused(layer_of(node), no.node.name, str(no)))
            continue
        bias = " + selection bias" if found.bias is not None else ""
        rewritten.append(Rewritten(layer_of(found.logits), f"{found.gate}{bias}", "dsmoe::route", found.logits.name))
        rewrite(gm.graph, found)
    gm.graph.eliminate_dead_code()
    return PassResult("match_router", tuple(rewritten), tuple(refused))


def match(node: fx.Node, known: Known | None = None) -> Match:
    """The gate in front of one `dsmoe::experts`. Raises: Mismatch, with the reason that it is no `dsmoe::route`.

    `known` holds what regions were identified as, or why they were not.
    """
    known = {} if known is None else known
    first: Mismatch | None = None
    for region in regions(node):
        try:
            gate, dtype = _identified(region, known)
            return Match(gate, dtype, region.logits, region.bias, region.weights, region.experts)
        except Mismatch as no:
            first = first or no
    assert first is not None
    raise first


def rewrite(graph: fx.Graph, found: Match) -> None:
    """Put `dsmoe::route` behind the logits, and its outputs in the place of weights and ids."""
    before = max([found.logits] + ([found.bias] if found.bias is not None else [])).next
    logits, bias = found.logits, found.bias
    if value(logits).dtype != found.dtype:
        cast = {"dtype": found.dtype}
        logits = call(graph, aten._to_copy.default, (logits,), kwargs=cast, before=before, like=found.logits)
    if bias is not None and value(bias).dim() != 1:
        bias = call(graph, aten.view.default, (bias, [value(bias).numel()]), before=before, like=found.logits)
    route = call(
        graph, torch.ops.dsmoe.route.default, (logits, bias, *astuple(found.gate)), before=before, like=found.logits
    )
    weights, experts = (item(graph, route, index, before=before) for index in range(2))
    found.experts.replace_all_uses_with(experts)
    _replace_weights(graph, found.weights, weights, before)


def _replace_weights(graph: fx.Graph, old: fx.Node, new: fx.Node, before: fx.Node) -> None:
    """The experts read the operator's weights; whatever else reads them sees the dtype that it saw."""
    for user in list(old.users):
        if user.target is torch.ops.dsmoe.experts.default:
            user.replace_input_with(old, new)
    if old.users and value(old).dtype != value(new).dtype:
        new = call(graph, aten._to_copy.default, (new,), kwargs={"dtype": value(old).dtype}, before=before, like=old)
    old.replace_all_uses_with(new)


def _identified(region: Region, known: Known) -> tuple[Gate, torch.dtype]:
    key = region.key()
    if key not in known:
        try:
            known[key] = identify(region, probe(region))
        except Mismatch as no:
            known[key] = str(no)
    found = known[key]
    if isinstance(found, str):
        raise Mismatch(region.experts, found)
    return found


def _is_routed(ids: object) -> bool:
    return (
        isinstance(ids, fx.Node)
        and ids.target is operator.getitem
        and ids.args[0].target is torch.ops.dsmoe.route.default  # type: ignore[union-attr]
    )
