"""Gate GEMM, dsmoe::route and dsmoe::experts -> one dsmoe::moe.

Before
  l_TE       = linear(x_TH.float(), router_EH.float())
  w_TK, i_TK = dsmoe.route(l_TE, ...)
  y_TH       = dsmoe.experts(x_TH, i_TK, w_TK, gate_up, down)
After
  y_TH, i_TK = dsmoe.moe(x_TH, router_EH, ..., gate_up, down)

The ids stay readable (they are the operator's second output), the weights and the scores do not: a graph that uses
them keeps the two operators apart. Same arithmetic: the operator is the composition of the two.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from dsmoe_passes.region import call, is_weight, item, same_tensor, uncast, value
from dsmoe_passes.result import Mismatch, PassResult, Refused, Rewritten, layer_of

aten = torch.ops.aten


def fuse_moe(gm: fx.GraphModule) -> PassResult:
    """Fuse every pair of `dsmoe::route` and `dsmoe::experts` that is only used together."""
    rewritten, refused = [], []
    for node in list(gm.graph.find_nodes(op="call_function", target=torch.ops.dsmoe.experts.default)):
        try:
            route, x, weight, bias, dtype = match(node)
        except Mismatch as no:
            refused.append(Refused(layer_of(node), no.node.name, str(no)))
            continue
        rewritten.append(Rewritten(layer_of(node), "route + experts", "dsmoe::moe", node.name))
        rewrite(gm.graph, node, route, x, weight, bias, dtype)
    gm.graph.eliminate_dead_code()
    return PassResult("fuse_moe", tuple(rewritten), tuple(refused))


def match(experts: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None, str]:
    """The route behind `experts`, and x, weight, bias and dtype of its gate. Raises: Mismatch with the reason."""
    ids, weights = experts.args[1], experts.args[2]
    route = ids.args[0] if isinstance(ids, fx.Node) and ids.target is operator.getitem else None
    if not isinstance(route, fx.Node) or route.target is not torch.ops.dsmoe.route.default:
        raise Mismatch(experts, "the expert ids do not come from a dsmoe::route")
    for output in route.users:
        others = [user for user in output.users if user is not experts]
        if output.args[1] == 0 and others:
            raise Mismatch(output, f"the routing weights have another user, {others[0].name}")
        if any(user < experts for user in others):
            raise Mismatch(output, f"the expert ids are used by {min(others).name} before the experts run")
    if not isinstance(weights, fx.Node) or weights.args != (route, 0):
        raise Mismatch(experts, "ids and weights come from different gates")
    logits = route.args[0]
    assert isinstance(logits, fx.Node)
    if logits.target is not aten.linear.default:
        raise Mismatch(logits, f"the logits come from {logits.target}, not from aten.linear")
    if len(logits.users) > 1:
        other = next(user for user in logits.users if user is not route)
        raise Mismatch(logits, f"the logits have another user, {other.name}")
    x, weight = uncast(logits.args[0]), uncast(logits.args[1])  # type: ignore[arg-type]
    bias = uncast(logits.args[2]) if len(logits.args) > 2 and isinstance(logits.args[2], fx.Node) else None
    if same_tensor(x) is not same_tensor(experts.args[0]):  # type: ignore[arg-type]
        raise Mismatch(logits, f"the gate reads {x.name}, the experts read {experts.args[0]}")
    if not is_weight(weight):
        raise Mismatch(weight, "the gate's weight is computed in the graph")
    exact = torch.promote_types(value(x).dtype, torch.float32)
    if value(logits).dtype == exact:
        return route, x, weight, bias, "float32"
    return route, x, weight, bias, "activation"


def rewrite(
    graph: fx.Graph, experts: fx.Node, route: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, dtype: str
) -> None:
    """Put `dsmoe::moe` in the place of `experts`, and its ids in the place of the route's."""
    gate_up, down, *rest = experts.args[3:]
    args = (x, weight, bias, *route.args[1:], dtype, gate_up, down, *rest, None, None, None)
    fused = call(graph, torch.ops.dsmoe.moe.default, args, before=experts, like=experts)
    experts.replace_all_uses_with(item(graph, fused, 0, before=experts))
    for output in list(route.users):
        if output.args[1] == 1:
            output.replace_all_uses_with(item(graph, fused, 1, before=experts))
