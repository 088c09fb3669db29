"""The region of a gate: the nodes between the logits and the ids and weights that the experts read.

  logits_TE = linear(x_TH, router_EH)
  ...                                            the region
  y_TH      = dsmoe.experts(x_TH, ids_TK, weights_TK, ...)

Where a whole region is no gate that the operator knows, a smaller one may be. So it is also cut behind operations on
the logits alone (a factor, a soft cap), and in front of operations on the weights alone (a factor of each expert, a
mask): what is cut off stays in the graph.

T tokens, H hidden size, E experts, K chosen per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dsmoe_passes.functionalise import writes
from dsmoe_passes.region import between, is_symbol, is_weight, value
from dsmoe_passes.result import Mismatch

aten = torch.ops.aten
GEMMS = {aten.linear.default, aten.addmm.default}
SCORES: dict[Any, str] = {
    aten.softmax.int: "softmax",
    aten._softmax.default: "softmax",
    aten.sigmoid.default: "sigmoid",
    aten.softplus.default: "sqrtsoftplus",
}
MOST_CUTS = 5


@dataclass(frozen=True)
class Region:
    """A gate's nodes in graph order, what they read, and what they give.

    `selecting` are the nodes that the ids depend on. `whole`: the experts read its weights; where something lies in
    between, that may go by the slot in which an expert stands, so the order within a row is part of what is computed.
    """

    inside: list[fx.Node]
    selecting: frozenset[fx.Node]
    logits: fx.Node
    bias: fx.Node | None
    weights: fx.Node
    experts: fx.Node
    n_experts: int
    top_k: int
    whole: bool

    def key(self) -> tuple:
        """Equal for regions that compute the same, whatever their nodes are called."""
        where: dict[fx.Node, Any] = {self.logits: "logits"} | ({self.bias: "bias"} if self.bias is not None else {})
        rows: list[tuple] = [(self.n_experts, self.top_k, self.whole, *(_kind(n) for n in where))]
        for i, node in enumerate(self.inside):
            args = fx.node.map_arg((node.args, node.kwargs), lambda n: where.get(n, str(n.meta.get("val"))))
            rows.append((str(node.target), repr(args), _kind(node)))
            where[node] = i
        return (*rows, where[self.weights], where[self.experts])


def regions(node: fx.Node) -> Iterator[Region]:
    """The regions in front of one `dsmoe::experts`, the largest first. Raises: Mismatch, where there is none."""
    experts, weights, stacked = node.args[1], node.args[2], node.args[3]
    assert isinstance(experts, fx.Node)
    assert isinstance(weights, fx.Node)
    assert isinstance(stacked, fx.Node)
    n_experts, top_k = value(stacked).shape[0], value(experts).shape[1]
    if not isinstance(top_k, int):
        raise Mismatch(experts, f"the number of experts per token is {top_k}, not a constant")
    first: Mismatch | None = None
    for logits in _logits(experts, weights, n_experts):
        for inner in _inner_weights(weights, experts):
            try:
                yield _cut(logits, inner, experts, n_experts, top_k, inner is weights)
            except Mismatch as no:
                first = first or no
    if first is not None:
        raise first


def _cut(logits: fx.Node, weights: fx.Node, experts: fx.Node, n_experts: int, top_k: int, whole: bool) -> Region:
    inside, leaves = between([experts, weights], lambda n: n is logits or n.target in GEMMS)
    gemms = [n for n in leaves if n is not logits and not is_weight(n)]
    if gemms:
        names = ", ".join(n.name for n in [logits, *gemms])
        raise Mismatch(
            experts, f"the expert ids come from the GEMMs {names}; a gate computes them from the logits of one"
        )
    others = [n for n in leaves if n is not logits]
    if len(others) > 1 or any(not _is_bias(n, n_experts) for n in others):
        names = ", ".join(f"{n.name} {tuple(value(n).shape)}" for n in others)
        because = f"beside the logits the gate reads {names}; dsmoe::route takes one bias [{n_experts}] of floats"
        raise Mismatch(experts, because)
    selecting, _ = between([experts], lambda n: n is logits)
    for node in (logits, *inside):
        writer = next((n for n in (node, *node.users) if writes(n)), None)
        if writer is not None:
            raise Mismatch(writer, f"{writer.name} ({writer.target}) overwrites a value that others may see")
    bias = others[0] if others else None
    return Region(inside, frozenset(selecting), logits, bias, weights, experts, n_experts, top_k, whole)


def _logits(experts: fx.Node, weights: fx.Node, n_experts: int) -> list[fx.Node]:
    """The gate's GEMM, and what follows it as operations on the logits alone, up to the score."""
    inside, leaves = between([experts, weights], lambda n: n.target in GEMMS)
    gemms = [n for n in leaves if not is_weight(n)]
    if not gemms:
        raise Mismatch(experts, "the expert ids come from no GEMM; a gate computes them from the logits of one")
    _, read = between([experts], lambda n: n.target in GEMMS)
    deciding = [n for n in read if n in gemms]
    if not deciding:
        names = ", ".join(f"{n.name} {tuple(value(n).shape)}" for n in read if is_weight(n)) or "no tensor"
        because = (
            f"the expert ids are looked up in {names} and do not depend on the logits; dsmoe::route selects by score"
        )
        raise Mismatch(experts, because)
    found: list[fx.Node] = []
    node: fx.Node | None = deciding[0]
    within = set(inside) | {deciding[0]}
    while node is not None and node.target not in SCORES and len(found) < MOST_CUTS:
        if _sizes(node)[1:] == [str(n_experts)]:
            found.append(node)
        users = [user for user in node.users if user in within and not is_symbol(user)]
        node = users[0] if len(users) == 1 and isinstance(users[0].meta.get("val"), torch.Tensor) else None
    if not found:
        logits = deciding[0]
        because = (
            f"logits must have shape [T, {n_experts}], one for each routed expert, got {tuple(value(logits).shape)}"
        )
        raise Mismatch(logits, because)
    return found


def _inner_weights(weights: fx.Node, experts: fx.Node) -> Iterator[fx.Node]:
    """The weights that the experts read, and what they are computed from, one operation further in at a time."""
    for _ in range(MOST_CUTS):
        yield weights
        sources = [
            source
            for source in weights.all_input_nodes
            if isinstance(source.meta.get("val"), torch.Tensor)
            and _sizes(source) == _sizes(weights)
            and _is_float(source)
            and not is_weight(source)
            and _reads_gemm(source, experts)
        ]
        if len(sources) != 1:
            return
        weights = sources[0]


def _reads_gemm(node: fx.Node, experts: fx.Node) -> bool:
    """Whether `node` is computed from a GEMM otherwise than by way of the ids."""
    _, leaves = between([node], lambda n: n is experts or n.target in GEMMS)
    return any(n.target in GEMMS for n in leaves)


def _is_float(node: fx.Node) -> bool:
    return value(node).dtype.is_floating_point


def _is_bias(node: fx.Node, n_experts: int) -> bool:
    """Whether `node` holds one float for each expert."""
    return (
        _is_float(node) and sorted(_sizes(node))[-1:] == [str(n_experts)] and set(_sizes(node)) <= {"1", str(n_experts)}
    )


def _sizes(node: fx.Node) -> list[str]:
    """The shape as text: comparing symbolic sizes would guard on them."""
    return [str(size) for size in value(node).shape]


def _kind(node: fx.Node) -> str:
    val = node.meta.get("val")
    return f"{val.dtype}{_sizes(node)}" if isinstance(val, torch.Tensor) else str(type(val))
