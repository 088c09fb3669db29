"""Routed experts, however they are spelled -> one dsmoe::experts.

Before (one of)
  a loop over experts, unrolled            where(experts == e), two GEMMs, index_add         experts_loop
  GEMMs over groups of sorted rows         sort, grouped_mm, grouped_mm, inverse, sum        experts_grouped
  GEMMs with gathered weights              bmm(gate_up[ids], rows), bmm(down[ids], ...), sum experts_batched
After
  y_TH = dsmoe.experts(x_TH, experts_TK, weights_TK, gate_up, down, biases, activation, layout)

T tokens, H model width, K slots. The same products, summed in float32 and rounded once; the last bits may differ,
because the operator may join the GEMMs of several rows differently, and where the graph rounds between them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from dsmoe_passes.experts_batched import is_batched, read_batched
from dsmoe_passes.experts_grouped import is_grouped, read_grouped
from dsmoe_passes.experts_loop import is_tail, read_loop
from dsmoe_passes.experts_match import Match
from dsmoe_passes.experts_pair import Gemm, firsts_of, read_pair
from dsmoe_passes.region import call, value
from dsmoe_passes.result import Mismatch, PassResult, Refused, Rewritten, layer_of

aten = torch.ops.aten
Found = list[tuple[fx.Node, Match]]
Left = list[Refused]


def match_experts(gm: fx.GraphModule) -> PassResult:
    """Rewrite all routed experts in `gm`; what looks like some and is left alone is refused with node and reason."""
    found, refused = loops(gm)
    for is_gemm, read_gemm, spelling in (
        (is_grouped, read_grouped, "grouped_mm"),
        (is_batched, read_batched, "batched_mm"),
    ):
        more, left = pairs(gm, is_gemm, read_gemm, spelling)
        found, refused = found + more, refused + left
    rewritten = [Rewritten(layer_of(node), match.spelling, "dsmoe::experts", node.name) for node, match in found]
    replaced: dict[fx.Node, fx.Node] = {}
    for node, match in found:
        replaced[match.result] = rewrite(gm.graph, match, replaced, like=node)
    gm.graph.eliminate_dead_code()
    return PassResult("match_experts", tuple(rewritten), tuple(refused))


def loops(gm: fx.GraphModule) -> tuple[Found, Left]:
    """The loops over experts in `gm`, each with its last node, and those that are otherwise."""
    found: Found = []
    refused: Left = []
    for tail in gm.graph.find_nodes(op="call_function", target=aten.index_add.default):
        if not is_tail(tail):
            continue
        try:
            match = read_loop(tail)
        except Mismatch as no:
            refused.append(Refused(layer_of(tail), no.node.name, str(no)))
        else:
            found += [(tail, match)] if match is not None else []
    return found, refused


def pairs(
    gm: fx.GraphModule, is_gemm: Callable[[fx.Node], bool], read_gemm: Callable[[fx.Node], Gemm], spelling: str
) -> tuple[Found, Left]:
    """The pairs of GEMMs over all experts in `gm`, each with its second GEMM, and those that are otherwise."""
    found: Found = []
    refused: Left = []
    alone: dict[fx.Node, None] = {}
    seconds: set[fx.Node] = set()
    for node in [node for node in gm.graph.nodes if is_gemm(node)]:
        firsts = [first for first in firsts_of(node, is_gemm) if first not in seconds]
        if not firsts:
            alone[node] = None
            continue
        seconds.add(node)
        for first in firsts:
            alone.pop(first, None)
        try:
            found.append((node, read_pair(firsts, node, read_gemm, spelling)))
        except Mismatch as no:
            refused.append(Refused(layer_of(node), no.node.name, str(no)))
    for node in alone:
        because = f"no second GEMM over the same experts reads what {node.name} and an activation give"
        refused.append(Refused(layer_of(node), node.name, because))
    return found, refused


def rewrite(graph: fx.Graph, found: Match, replaced: dict[fx.Node, fx.Node], *, like: fx.Node) -> fx.Node:
    """Put `dsmoe::experts` in the place of the result; `replaced` are the results of layers rewritten before."""
    x = _cast(graph, replaced.get(found.x, found.x), found.x_dtype, found.result)
    weights = _cast(graph, found.weights, found.weights_dtype, found.result)
    shape = (found.activation.name, found.activation.alpha, found.activation.limit, found.layout)
    stacked = (found.gate_up, found.down, found.gate_up_bias, found.down_bias)
    args = (x, found.experts, weights, *stacked, *shape)
    fused = call(graph, torch.ops.dsmoe.experts.default, args, before=found.result, like=like)
    found.result.replace_all_uses_with(fused)
    return fused


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    if value(node).dtype == dtype:
        return node
    return call(graph, aten._to_copy.default, (node,), before=before, like=node, kwargs={"dtype": dtype})
