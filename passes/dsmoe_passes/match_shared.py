"""The shared experts -> the shared operands of dsmoe::moe.

Before
  y_TH, i_TK = dsmoe.moe(x_TH, ..., None, None, None)
  a_TS       = activation(linear(x_TH, gate_SH), linear(x_TH, up_SH))
  z_TH       = add(y_TH, linear(a_TS, down_HS))
After
  both_2SH   = cat([gate_SH, up_SH])
  z_TH, i_TK = dsmoe.moe(x_TH, ..., both_2SH, down_HS, None)

S is the width of all shared experts together: they are one feed-forward, because SwiGLU is element-wise. The `cat` of
two parameters is for pack_weights to fold; where weights cannot be packed (a graph that trains, or one whose
parameters are inputs), shared experts with gate and up apart are left to Inductor. Routed and shared outputs are
summed in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import fx

from dsmoe_passes.activations import Activation, identify_apart, identify_joined
from dsmoe_passes.region import between, call, is_weight, same_tensor, value
from dsmoe_passes.result import Mismatch, PassResult, Refused, Rewritten, layer_of

aten = torch.ops.aten
MOE = torch.ops.dsmoe.moe.default
FIRST_SHARED = -3  # shared_gate_up, shared_down, shared_gate are the last operands of dsmoe::moe


def match_shared(gm: fx.GraphModule) -> PassResult:
    """Give every `dsmoe::moe` the shared experts that are added to its output."""
    rewritten, refused = [], []
    for node in list(gm.graph.find_nodes(op="call_function", target=MOE)):
        total = find_sum(node)
        if total is None or node.args[FIRST_SHARED] is not None:
            continue
        try:
            gate_up, down = match(node, total)
            if len(gate_up) == 2 and any(w.op != "get_attr" for w in gate_up):
                because = "gate and up are two tensors; they are only joined where parameters are packed, ahead of time"
                raise Mismatch(gate_up[0], because)
        except Mismatch as no:
            refused.append(Refused(layer_of(node), no.node.name, str(no)))
            continue
        width = value(down).shape[1]
        rewritten.append(Rewritten(layer_of(node), f"shared experts of width {width}", "dsmoe::moe", total.name))
        rewrite(gm.graph, node, total, gate_up, down)
    gm.graph.eliminate_dead_code()
    return PassResult("match_shared", tuple(rewritten), tuple(refused))


def find_sum(moe: fx.Node) -> fx.Node | None:
    """The `add` of the operator's output and a GEMM, where the output's only user is one."""
    output = next((user for user in moe.users if user.args[1] == 0), None)
    if output is None or len(output.users) != 1:
        return None
    total = next(iter(output.users))
    if total.target is not aten.add.Tensor or total.kwargs.get("alpha", 1) != 1:
        return None
    other = total.args[1] if total.args[0] is output else total.args[0]
    return total if isinstance(other, fx.Node) and other.target is aten.linear.default else None


def match(moe: fx.Node, total: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """Weights of the shared feed-forward: `[gate_up]` or `[gate, up]`, and down. Raises: Mismatch with the reason."""
    other = next(a for a in total.args if isinstance(a, fx.Node) and a.target is aten.linear.default)
    activated, down = _gemm(other, "shared down")
    inside, gemms = between([activated], lambda n: n.target is aten.linear.default)
    if any(n.target is not aten.linear.default for n in gemms):
        raise Mismatch(activated, "the shared experts' activation reads more than their gate and up GEMMs")
    for gemm in gemms:
        rows, _ = _gemm(gemm, "shared gate or up")
        if same_tensor(rows) is not same_tensor(moe.args[0]):  # type: ignore[arg-type]
            raise Mismatch(gemm, f"the shared experts read {rows.name}, the routed experts read {moe.args[0]}")
    for node in [*inside, *gemms, other]:
        outside = [user for user in node.users if user not in inside and user not in (other, total)]
        if outside:
            raise Mismatch(node, f"{node.name} has another user, {outside[0].name}: fused, it would not be there")
    names = MOE._schema.arguments
    given = {argument.name: moe.args[i] for i, argument in enumerate(names)}
    wanted = Activation(given["activation"], given["alpha"], given["limit"])  # type: ignore[arg-type]
    if len(gemms) == 1:
        found, layout = identify_joined(inside, gemms[0], activated, value(gemms[0]).shape[-1])
        if (found, layout) != (wanted, "concat"):
            raise Mismatch(activated, f"the shared experts compute {found} {layout}, the routed ones {wanted} concat")
        return [_gemm(gemms[0], "")[1]], down
    if len(gemms) != 2:
        raise Mismatch(activated, f"the shared experts' activation reads {len(gemms)} GEMMs, not gate and up")
    for gate, up in (gemms, gemms[::-1]):
        if identify_apart(inside, gate, up, activated, value(gate).shape[-1]) == wanted:
            return [_gemm(gate, "")[1], _gemm(up, "")[1]], down
    raise Mismatch(activated, f"the shared experts' activation is not the routed experts' {wanted.name}")


def rewrite(graph: fx.Graph, moe: fx.Node, total: fx.Node, gate_up: list[fx.Node], down: fx.Node) -> None:
    """Hand the shared weights to the operator, whose output then is the sum."""
    joined = gate_up[0]
    if len(gate_up) == 2:
        joined = call(graph, aten.cat.default, (gate_up, 0), before=moe, like=moe)
    moe.args = (*moe.args[:FIRST_SHARED], joined, down, None)
    total.replace_all_uses_with(next(user for user in moe.users if user.args[1] == 0))


def _gemm(gemm: fx.Node, role: str) -> tuple[fx.Node, fx.Node]:
    if len(gemm.args) > 2 and gemm.args[2] is not None:
        raise Mismatch(gemm, f"the {role} GEMM adds a bias ({gemm.args[2]}); the operator has none there")
    rows, weight = gemm.args[0], gemm.args[1]
    assert isinstance(rows, fx.Node)
    assert isinstance(weight, fx.Node)
    if not is_weight(weight):
        raise Mismatch(weight, f"the {role} weight is computed in the graph")
    return rows, weight
