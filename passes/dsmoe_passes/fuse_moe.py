"""Gate GEMM, dsmoe::route and dsmoe::experts -> one dsmoe::moe.

Before
  l_TE       = linear(x_TH.float(), router_EH.float())
  w_TK, i_TK = dsmoe.route(l_TE, ...)
  y_TH       = mul(dsmoe.experts(x_TH, i_TK, w_TK, gate_up, down), c)
After
  y_TH, i_TK = dsmoe.moe(x_TH, router_EH, ..., c * scale, ..., gate_up, down)

The ids stay readable (they are the operator's second output), the weights and the scores do not: a graph that uses
them keeps the two operators apart. The gate and the experts may read x in different shapes and dtypes, as long as it is
the same x. A constant factor on the output becomes one on the weights.

Numbers: the operator is the composition of the two. A gate that multiplies in the activation's dtype but scores in
float32 does both in float32: its logits are not rounded in between, which is closer to the exact ones.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from dsmoe_passes.region import call, is_weight, item, uncast, value
from dsmoe_passes.result import Mismatch, PassResult, Refused, Rewritten, layer_of
from dsmoe_passes.same_rows import holds_rows_of, unviewed

aten = torch.ops.aten
SIZES = {aten.sym_size.int}
SCALE = [argument.name for argument in torch.ops.dsmoe.moe.default._schema.arguments].index("scale")


@dataclass(frozen=True)
class Match:
    """A route and the experts behind it, and the operands of the GEMM in front of it."""

    route: fx.Node
    experts: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    router_dtype: str


def fuse_moe(gm: fx.GraphModule) -> PassResult:
    """Fuse every pair of `dsmoe::route` and `dsmoe::experts` that is only used together."""
    rewritten, refused = [], []
    gm.graph.eliminate_dead_code()  # a user that nobody uses does not keep them apart
    for node in list(gm.graph.find_nodes(op="call_function", target=torch.ops.dsmoe.experts.default)):
        try:
            found = match(node)
        except Mismatch as no:
            refused.append(Refused(layer_of(node), no.node.name, str(no)))
            continue
        rewritten.append(Rewritten(layer_of(node), "route + experts", "dsmoe::moe", node.name))
        rewrite(gm.graph, found)
    gm.graph.eliminate_dead_code()
    return PassResult("fuse_moe", tuple(rewritten), tuple(refused))


def match(experts: fx.Node) -> Match:
    """The route behind `experts` and the GEMM behind that. Raises: Mismatch with the reason that they stay apart."""
    ids, weights = experts.args[1], experts.args[2]
    route = ids.args[0] if isinstance(ids, fx.Node) and ids.target is operator.getitem else None
    if not isinstance(route, fx.Node) or route.target is not torch.ops.dsmoe.route.default:
        raise Mismatch(experts, "the expert ids do not come from a dsmoe::route")
    if not isinstance(weights, fx.Node) or weights.args != (route, 0):
        name = getattr(weights, "name", weights)
        raise Mismatch(experts, f"the experts read {name}, not the gate's own weights: they stay two operators")
    for output in route.users:
        others = [user for user in output.users if user is not experts]
        if output.args[1] == 0 and others:
            because = f"the routing weights have another user, {others[0].name}; dsmoe::moe does not give them out"
            raise Mismatch(output, because)
        if any(user < experts for user in others):
            raise Mismatch(output, f"the expert ids are used by {min(others).name} before the experts run")
    logits = uncast(unviewed(route.args[0]))  # type: ignore[arg-type]
    if logits.target is not aten.linear.default:
        raise Mismatch(logits, f"the logits come from {logits.target}, not from aten.linear")
    others = [user for user in logits.users if not _leads_to(user, route) and user.target not in SIZES]
    if others:
        because = f"the logits have another user, {others[0].name}; dsmoe::moe does not give them out"
        raise Mismatch(logits, because)
    x, weight = logits.args[0], uncast(logits.args[1])  # type: ignore[arg-type]
    bias = uncast(logits.args[2]) if len(logits.args) > 2 and isinstance(logits.args[2], fx.Node) else None
    assert isinstance(x, fx.Node)
    if not holds_rows_of(x, experts.args[0]):  # type: ignore[arg-type]
        because = f"the gate reads {uncast(unviewed(x)).name}, the experts read {unviewed(experts.args[0]).name}"  # type: ignore[arg-type]
        raise Mismatch(logits, because)
    if not is_weight(weight) or (bias is not None and not is_weight(bias)):
        raise Mismatch(weight, "the gate's weight or bias is computed in the graph")
    return Match(route, experts, weight, bias, _router_dtype(logits, route, experts))


def rewrite(graph: fx.Graph, found: Match) -> None:
    """Put `dsmoe::moe` in the place of the experts, and its ids in the place of the route's."""
    route, experts = found.route, found.experts
    x, gate_up, down, *rest = experts.args[0], *experts.args[3:]
    args = (x, found.weight, found.bias, *route.args[1:], found.router_dtype, gate_up, down, *rest, None, None, None)
    fused = call(graph, torch.ops.dsmoe.moe.default, args, before=experts, like=experts)
    y = item(graph, fused, 0, before=experts)
    experts.replace_all_uses_with(y)
    for output in list(route.users):
        if output.args[1] == 1:
            output.replace_all_uses_with(item(graph, fused, 1, before=experts))
    absorb_factor(fused, y)


def absorb_factor(moe: fx.Node, y: fx.Node) -> None:
    """A constant that is all that becomes of the output belongs to the scale of the weights."""
    node = y
    while len(node.users) == 1 and unviewed(next(iter(node.users))) is y:
        node = next(iter(node.users))
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.target is not aten.mul.Tensor or value(user).dtype != value(y).dtype:
        return
    factors = [arg for arg in user.args if isinstance(arg, int | float)]
    if len(factors) == 1:
        scale = moe.args[SCALE]
        assert isinstance(scale, float)
        moe.args = (*moe.args[:SCALE], scale * factors[0], *moe.args[SCALE + 1 :])
        user.replace_all_uses_with(node)


def _router_dtype(logits: fx.Node, route: fx.Node, experts: fx.Node) -> str:
    x = value(experts.args[0]).dtype  # type: ignore[arg-type]
    multiplied, scored = value(logits).dtype, value(route.args[0]).dtype  # type: ignore[arg-type]
    if scored == torch.promote_types(x, torch.float32):
        return "float32"
    if multiplied == scored == x:
        return "activation"
    because = f"the gate multiplies in {multiplied} and scores in {scored}; dsmoe::moe does both in float32 or in {x}"
    raise Mismatch(route, because)


def _leads_to(user: fx.Node, route: fx.Node) -> bool:
    """Whether `user` is `route`, or a view or cast of the logits that only `route` reads."""
    while user is not route:
        if len(user.users) != 1 or (user.target is not aten._to_copy.default and unviewed(user) is user):
            return False
        user = next(iter(user.users))
    return True
