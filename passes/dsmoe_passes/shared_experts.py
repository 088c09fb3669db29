"""Read a feed-forward beside the routed experts: its weights, its activation, its gate.

  a_TS = activation(linear(x_TH, gate_SH), linear(x_TH, up_SH))        gate and up apart
  a_TS = activation(linear(x_TH, gate_up_2SH))                         joined, the gate's rows first
  a_TS = activation(linear(x_TH, up_SH))                               beside routed experts that are not gated either
  y_TH = linear(a_TS, down_HS)
  y_TH = sigmoid(linear(x_TH, gate_1H)) * y_TH                         with a gate of its own

T tokens, H hidden size, S the width of all shared experts together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from dsmoe_passes.activations import Activation, identify_alone, identify_apart, identify_joined
from dsmoe_passes.region import between, is_symbol, is_weight, value
from dsmoe_passes.result import Mismatch
from dsmoe_passes.same_rows import holds_rows_of, unviewed

aten = torch.ops.aten
LINEAR = aten.linear.default
MOST_NODES = 24  # of an activation; what is larger is no feed-forward
FAILURES = (RuntimeError, IndexError, TypeError, ValueError)


@dataclass(frozen=True)
class Shared:
    """The operands of the shared experts: `[gate_up]` or `[gate, up]` (or `[up]`), down, and the gate `[1, H]`."""

    gate_up: list[fx.Node]
    down: fx.Node
    gate: fx.Node | None


@dataclass(frozen=True)
class Routed:
    """What the shared experts must fit: the tokens, and what the routed experts compute on them."""

    x: fx.Node
    activation: Activation
    layout: str


def feed_forward(term: fx.Node) -> fx.Node | None:
    """The down GEMM, if `term` is a feed-forward's answer, viewed, cast or times something; else None."""
    root = _uncast(term)
    if root.target is aten.mul.Tensor:
        roots = [_uncast(arg) for arg in root.args if isinstance(arg, fx.Node)]
        root = next((node for node in roots if node.target is LINEAR and value(node).shape[-1] != 1), root)
    if root.target is not LINEAR:
        return None
    inside, leaves = between([root.args[0]], lambda n: n.target is LINEAR)  # type: ignore[list-item]
    gemms = [n for n in leaves if n.target is LINEAR]
    return root if gemms and len(gemms) == len(leaves) and 0 < len(inside) <= MOST_NODES else None


def read(term: fx.Node, down: fx.Node, total: fx.Node, routed: Routed) -> Shared:
    """The operands of the feed-forward that ends in `down` and is added as `term`. Raises: Mismatch with the reason."""
    gate, between_down_and_total = _gate(term, down, routed)
    activated, down_weight = _gemm(down, "shared down")
    inside, gemms = between([activated], lambda n: n.target is LINEAR)
    for gemm in gemms:
        rows, _ = _gemm(gemm, "shared gate or up")
        if not holds_rows_of(rows, routed.x):
            read_by = (
                f"the shared experts read {unviewed(rows).name}, the routed experts read {unviewed(routed.x).name}"
            )
            raise Mismatch(gemm, read_by)
    private = {*inside, *gemms, down, *between_down_and_total}
    for node in sorted(private):
        outside = [user for user in node.users if user not in private and user is not total and not is_symbol(user)]
        if outside:
            raise Mismatch(node, f"{node.name} has another user, {outside[0].name}: fused, it would not be there")
    try:
        weights = _weights(inside, gemms, activated, routed)
    except FAILURES as error:
        raise Mismatch(activated, f"the activation cannot be run on its own: {str(error).splitlines()[0]}") from error
    return Shared(weights, down_weight, gate)


def _weights(inside: list[fx.Node], gemms: list[fx.Node], activated: fx.Node, routed: Routed) -> list[fx.Node]:
    """The weights in front of an activation that is the routed experts'."""
    wanted, gated = routed.activation, not routed.layout.startswith("ungated")
    width = value(gemms[0]).shape[-1]
    if len(gemms) > 2 or (len(gemms) == 2 and not gated):
        what = "gate and up" if gated else "one, as the routed ones do"
        raise Mismatch(activated, f"the shared experts' activation reads {len(gemms)} GEMMs, not {what}")
    if len(gemms) == 1 and gated:
        found, layout = identify_joined(inside, gemms[0], activated, width)
        if (found, layout) != (wanted, "concat"):
            raise Mismatch(activated, f"the shared experts compute {found} {layout}, the routed ones {wanted} concat")
        return [_gemm(gemms[0], "")[1]]
    if len(gemms) == 1:
        alone = identify_alone(inside, gemms[0], activated, width)
        if alone != wanted:
            raise Mismatch(activated, f"the shared experts compute {alone}, the routed ones {wanted}")
        return [_gemm(gemms[0], "")[1]]
    for gate, up in (gemms, gemms[::-1]):
        if identify_apart(inside, gate, up, activated, width) == wanted:
            return [_gemm(gate, "")[1], _gemm(up, "")[1]]
    raise Mismatch(activated, f"the shared experts' activation is not the routed experts' {wanted.name}")


def _gate(term: fx.Node, down: fx.Node, routed: Routed) -> tuple[fx.Node | None, list[fx.Node]]:
    """The weight `[1, H]` of the gate that multiplies the answer, or None, and the nodes from `down` to `term`."""
    root, nodes = _uncast(term), _chain(term)
    if root is down:
        return None, nodes
    nodes += [root]
    factors = [arg for arg in root.args if isinstance(arg, fx.Node)]
    answer = next((factor for factor in factors if _uncast(factor) is down), None)
    if answer is None or len(factors) != 2:
        raise Mismatch(root, f"the shared experts' answer is multiplied by {root.args[1]}, not by a sigmoid gate")
    factor = factors[1 - factors.index(answer)]
    sigmoid = _uncast(factor)
    source = _uncast(sigmoid.args[0]) if sigmoid.target is aten.sigmoid.default else None  # type: ignore[arg-type]
    if source is None or source.target is not LINEAR or value(source).shape[-1] != 1:
        because = f"the shared experts' answer is multiplied by {factor.name}, not by the sigmoid of one GEMM [1, H]"
        raise Mismatch(factor, because)
    rows, weight = _gemm(source, "shared gate")
    if not holds_rows_of(rows, routed.x):
        because = f"the shared experts' gate reads {unviewed(rows).name}, the routed experts {unviewed(routed.x).name}"
        raise Mismatch(source, because)
    return weight, [*nodes, *_chain(answer), *_chain(factor), sigmoid, *_chain(sigmoid.args[0]), source]  # type: ignore[arg-type]


def _chain(node: fx.Node) -> list[fx.Node]:
    """The views and casts from `node` down to what they view."""
    end, nodes = _uncast(node), []
    while node is not end:
        nodes.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return nodes


def _uncast(node: fx.Node) -> fx.Node:
    """`node` without views and casts in front of it."""
    while True:
        node = unviewed(node)
        if node.op != "call_function" or node.target is not aten._to_copy.default:
            return node
        node = node.args[0]  # type: ignore[assignment]


def _gemm(gemm: fx.Node, role: str) -> tuple[fx.Node, fx.Node]:
    if len(gemm.args) > 2 and gemm.args[2] is not None:
        raise Mismatch(gemm, f"the {role} GEMM adds a bias ({gemm.args[2]}); the operator has none there")
    rows, weight = gemm.args[0], gemm.args[1]
    assert isinstance(rows, fx.Node)
    assert isinstance(weight, fx.Node)
    if not is_weight(weight):
        raise Mismatch(weight, f"the {role} weight is computed in the graph")
    return rows, weight
