"""The shared experts -> the shared operands of dsmoe::moe.

Before
  y_TH, i_TK = dsmoe.moe(x_TH, ..., None, None, None)
  a_TS       = activation(linear(x_TH, gate_SH), linear(x_TH, up_SH))
  z_TH       = add(y_TH, linear(a_TS, down_HS))                     or sigmoid(linear(x_TH, gate_1H)) * linear(...)
After
  both_2SH   = cat([gate_SH, up_SH])
  z_TH, i_TK = dsmoe.moe(x_TH, ..., both_2SH, down_HS, None)        or gate_1H

S is the width of all shared experts together: they are one feed-forward, because SwiGLU is element-wise. They may be
added on either side, through views, and behind other sums (a residual): of those, the order changes. The `cat` of two
parameters is for pack_weights to fold; where weights cannot be packed (a graph that trains, or one whose parameters are
inputs), shared experts with gate and up apart are left to Inductor. Routed and shared outputs are summed in float32 and
rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from dsmoe_passes.activations import Activation
from dsmoe_passes.region import call, value
from dsmoe_passes.result import Mismatch, PassResult, Refused, Rewritten, layer_of
from dsmoe_passes.same_rows import unviewed
from dsmoe_passes.shared_experts import Routed, Shared, feed_forward, read

aten = torch.ops.aten
MOE = torch.ops.dsmoe.moe.default
FIRST_SHARED = -3  # shared_gate_up, shared_down, shared_gate are the last operands of dsmoe::moe


def match_shared(gm: fx.GraphModule) -> PassResult:
    """Give every `dsmoe::moe` the shared experts that are added to its output."""
    rewritten, refused = [], []
    for node in list(gm.graph.find_nodes(op="call_function", target=MOE)):
        for total, own, other in list(sums(node)):
            down = feed_forward(other)
            if down is None:
                continue
            try:
                found = match(node, total, other, down)
            except Mismatch as no:
                refused.append(Refused(layer_of(node), no.node.name, str(no)))
                continue
            gated = ", gated" if found.gate is not None else ""
            pattern = f"shared experts of width {value(found.down).shape[1]}{gated}"
            rewritten.append(Rewritten(layer_of(node), pattern, "dsmoe::moe", total.name))
            rewrite(gm.graph, node, total, own, found)
    gm.graph.eliminate_dead_code()
    return PassResult("match_shared", tuple(rewritten), tuple(refused))


def sums(moe: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """Every `total = own + other` that is all that becomes of the operator's output, which is in `own`."""
    node = next((user for user in moe.users if user.args[1] == 0), None)
    while node is not None and len(node.users) == 1:
        user = next(iter(node.users))
        if user.target is aten.add.Tensor and user.kwargs.get("alpha", 1) == 1:
            other = user.args[1] if user.args[0] is node else user.args[0]
            if not isinstance(other, fx.Node) or not _alike(user, node) or not _alike(user, other):
                return
            yield user, node, other
        elif user.target is not aten._to_copy.default and unviewed(user) is user:
            return
        node = user


def match(moe: fx.Node, total: fx.Node, term: fx.Node, down: fx.Node) -> Shared:
    """The shared experts added as `term`. Raises: Mismatch with the reason that the operator cannot take them."""
    if moe.args[FIRST_SHARED] is not None:
        raise Mismatch(total, "the layer has shared experts already; dsmoe::moe takes one feed-forward of them")
    given = {argument.name: moe.args[i] for i, argument in enumerate(MOE._schema.arguments)}
    activation = Activation(given["activation"], given["alpha"], given["limit"])  # type: ignore[arg-type]
    found = read(term, down, total, Routed(given["x"], activation, given["layout"]))  # type: ignore[arg-type]
    if len(found.gate_up) == 2 and any(weight.op != "get_attr" for weight in found.gate_up):
        because = "gate and up are two tensors; they are only joined where parameters are packed, ahead of time"
        raise Mismatch(found.gate_up[0], because)
    return found


def rewrite(graph: fx.Graph, moe: fx.Node, total: fx.Node, own: fx.Node, found: Shared) -> None:
    """Hand the shared weights to the operator; what was added to its output is then in it."""
    for weight in (*found.gate_up, found.down, found.gate):
        if weight is not None and weight > moe:
            moe.prepend(weight)
    joined = found.gate_up[0]
    if len(found.gate_up) == 2:
        joined = call(graph, aten.cat.default, (found.gate_up, 0), before=moe, like=moe)
    moe.args = (*moe.args[:FIRST_SHARED], joined, found.down, found.gate)
    total.replace_all_uses_with(own)


def _alike(one: fx.Node, other: fx.Node) -> bool:
    a, b = value(one), value(other)
    return a.dtype == b.dtype and str(a.shape) == str(b.shape)
