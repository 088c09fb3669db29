"""A loop over the experts -> one dsmoe::experts.

Before (the loop as tracing unrolls it, once for each expert e = 0 .. E-1)
  y_TH    = zeros_like(x_TH, dtype=float32)
  t, k    = where(eq(experts_TK, e))                       the tokens that chose expert e, and in which slot
  h_n2I   = linear(index(x_TH, [t]), select(gate_up_E2IH, 0, e))
  a_nI    = activation(h_n2I)                              recognised by what it computes
  o_nH    = linear(a_nI, select(down_EHI, 0, e))
  y_TH    = index_add(y_TH, 0, t, o_nH.float() * index(weights_TK, [t, k])[:, None])
After
  y_TH    = dsmoe.experts(x_TH, experts_TK, weights_TK, gate_up_E2IH, down_EHI, activation, layout)

T tokens, H model width, I expert width, E experts, K slots, n tokens of one expert. The same products, accumulated in
float32 in the same order of experts; the last bits may differ, because the operator may join the GEMMs of several
rows differently.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from dsmoe_passes.activations import Activation, identify_joined
from dsmoe_passes.region import between, call, fingerprint, is_symbol, is_weight, same_tensor, uncast, value
from dsmoe_passes.result import Mismatch, PassResult, Refused, Rewritten, layer_of

aten = torch.ops.aten
ZEROS = {aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default, aten.full.default, aten.full_like.default}


@dataclass(frozen=True)
class Link:
    """One turn of the loop: what expert `expert` adds to the sum."""

    add: fx.Node
    expert: int
    experts: fx.Node
    weights: fx.Node
    x: fx.Node
    gate_up: fx.Node
    down: fx.Node
    hidden: fx.Node
    activated: fx.Node
    activation: list[fx.Node]


@dataclass(frozen=True)
class Match:
    """A whole loop; `result` is the node that the operator's output replaces."""

    links: list[Link]
    activation: Activation
    layout: str
    result: fx.Node


def match_experts(gm: fx.GraphModule) -> PassResult:
    """Rewrite every loop over experts in `gm`; a loop that is left alone is refused with the node and the reason."""
    rewritten, refused = [], []
    for tail in [
        node for node in gm.graph.find_nodes(op="call_function", target=aten.index_add.default) if is_tail(node)
    ]:
        try:
            found = match(tail)
        except Mismatch as no:
            refused.append(Refused(layer_of(tail), no.node.name, str(no)))
            continue
        if found is not None:
            pattern = f"loop over {len(found.links)} experts"
            rewritten.append(Rewritten(layer_of(tail), pattern, "dsmoe::experts", tail.name))
            rewrite(gm.graph, found)
    gm.graph.eliminate_dead_code()
    return PassResult("match_experts", tuple(rewritten), tuple(refused))


def is_tail(node: fx.Node) -> bool:
    """The last of a chain of `index_add`: its sum feeds no further one."""
    return not any(user.target is aten.index_add.default and user.args[0] is node for user in node.users)


def match(tail: fx.Node) -> Match | None:
    """The loop that ends in `tail`; None if `tail` is no loop over experts at all.

    Raises: Mismatch with the reason, if it is such a loop but not one that `dsmoe::experts` computes.
    """
    chain = _chain(tail)
    if not any(_chosen(add) for add in chain):
        return None
    links = [_read_turn(add) for add in chain]
    first = links[0]
    start = chain[0].args[0]
    if not isinstance(start, fx.Node) or start.target not in ZEROS:
        raise Mismatch(chain[0], "the sum over experts does not start from zeros")
    _check_experts(links)
    for link in links[1:]:
        _check_like_first(link, first)
    for link in links:
        _check_private(link, chain)
    if len(first.gate_up.users) > len(links) or len(first.down.users) > len(links):
        raise Mismatch(first.gate_up, "the experts' weights have another user: packing them would pull the two apart")
    width = value(first.hidden).shape[-1]
    activation, layout = identify_joined(first.activation, first.hidden, first.activated, width)
    return Match(links, activation, layout, _result(tail, first.x))


def rewrite(graph: fx.Graph, found: Match) -> None:
    """Put `dsmoe::experts` in the place of the loop's result."""
    link, activation = found.links[0], found.activation
    shape = (activation.name, activation.alpha, activation.limit, found.layout)
    args = (link.x, link.experts, link.weights, link.gate_up, link.down, None, None, *shape)
    fused = call(graph, torch.ops.dsmoe.experts.default, args, before=found.result, like=found.links[-1].add)
    found.result.replace_all_uses_with(fused)


def _chain(tail: fx.Node) -> list[fx.Node]:
    chain = [tail]
    while isinstance(chain[-1].args[0], fx.Node) and chain[-1].args[0].target is aten.index_add.default:
        chain.append(chain[-1].args[0])
    return chain[::-1]


def _chosen(add: fx.Node) -> tuple[fx.Node, fx.Node, object] | None:
    """The `where` behind an `index_add`'s rows, the ids it looks at and the number it looks for."""
    where = add.args[2].args[0] if isinstance(add.args[2], fx.Node) and add.args[2].target is operator.getitem else None
    if not isinstance(where, fx.Node) or where.target not in (aten.where.default, aten.nonzero_numpy.default):
        return None
    mask = where.args[0]
    if not isinstance(mask, fx.Node) or mask.target is not aten.eq.Scalar:
        return None
    return where, mask.args[0], mask.args[1]  # type: ignore[return-value]


def _read_turn(add: fx.Node) -> Link:
    chosen = _chosen(add)
    if chosen is None:
        raise Mismatch(add, "one turn of the loop does not choose its tokens with where(experts == e)")
    where, experts, expert = chosen
    if value(experts).dim() != 2 or not isinstance(expert, int):
        raise Mismatch(experts, f"expert ids must have shape [T, K], got {tuple(value(experts).shape)}")
    token = add.args[2]
    if add.args[1] != 0 or add.kwargs.get("alpha", 1) != 1:
        raise Mismatch(add, "the experts' outputs are not added row by row with factor 1")
    out, weights = _read_weighted(add.args[3], token, where)
    activated, down, e_down = _read_gemm(out, "down")
    inside, leaves = between([activated], lambda n: n.target is aten.linear.default)
    gemms = [n for n in leaves if n.target is aten.linear.default]
    if len(gemms) != 1 or len(leaves) != 1:
        names = ", ".join(n.name for n in leaves)
        raise Mismatch(
            activated, f"the activation must read one joined gate-and-up GEMM and nothing else, it reads {names}"
        )
    rows, gate_up, e_up = _read_gemm(gemms[0], "gate and up")
    if (e_up, e_down) != (expert, expert):
        raise Mismatch(out, f"tokens of expert {expert} meet gate_up_proj[{e_up}] and down_proj[{e_down}]")
    if rows.target is not aten.index.Tensor or list(rows.args[1]) != [token]:  # type: ignore[arg-type]
        raise Mismatch(rows, "the first GEMM does not read the rows of the chosen tokens")
    x = rows.args[0]
    return Link(add, expert, experts, weights, x, gate_up, down, gemms[0], activated, inside)  # type: ignore[arg-type]


def _read_weighted(product: object, token: object, where: fx.Node) -> tuple[fx.Node, fx.Node]:
    """`out.float() * weights[t, k][:, None]`, in either order: the GEMM's output, and the weights `[T, K]`."""
    if isinstance(product, fx.Node):
        product = uncast(product)
    if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor:
        node = product if isinstance(product, fx.Node) else where
        raise Mismatch(node, "an expert's output is not multiplied by its routing weight before it is added")
    factors = [factor for factor in product.args if isinstance(factor, fx.Node)]
    gemm = next((factor for factor in factors if uncast(factor).target is aten.linear.default), None)
    if gemm is None or len(factors) != 2:
        raise Mismatch(product, "neither factor of the weighted output is the down GEMM")
    weight = factors[1 - factors.index(gemm)]
    if not value(product).dtype.is_floating_point or value(product).dtype.itemsize < 4:
        raise Mismatch(product, f"outputs are weighted in {value(product).dtype}; dsmoe::experts does so in float32")
    weights = _read_routing_weight(weight, token, where)  # type: ignore[arg-type]
    return uncast(gemm), weights


def _read_routing_weight(weight: fx.Node, token: object, where: fx.Node) -> fx.Node:
    """`index(unsqueeze(w, 2), [t, k])` or `unsqueeze(index(w, [t, k]), -1)`: the `[T, K]` weights."""
    if weight.target is aten.unsqueeze.default:
        picked, source = weight.args[0], None
    else:
        picked, source = weight, weight.args[0] if weight.args else None
    if not isinstance(picked, fx.Node) or picked.target is not aten.index.Tensor:
        raise Mismatch(weight, "the routing weight is not weights[token, slot]")
    at = list(picked.args[1])  # type: ignore[arg-type]
    slot = at[1] if len(at) == 2 else None
    if at[0] is not token or not isinstance(slot, fx.Node) or slot.args != (where, 1):
        raise Mismatch(picked, "the routing weight is read at other places than the chosen tokens and slots")
    if source is not None:
        if not isinstance(source, fx.Node) or source.target is not aten.unsqueeze.default:
            raise Mismatch(picked, "the routing weight is not one number a row")
        return source.args[0]  # type: ignore[return-value]
    return picked.args[0]  # type: ignore[return-value]


def _read_gemm(gemm: fx.Node, role: str) -> tuple[fx.Node, fx.Node, int]:
    """`linear(rows, stacked[e])`: the rows, the stacked weight, e."""
    if gemm.target is not aten.linear.default:
        raise Mismatch(gemm, f"the {role} GEMM is {gemm.target}, not aten.linear")
    if len(gemm.args) > 2 and gemm.args[2] is not None:
        raise Mismatch(gemm, f"the {role} GEMM adds a bias ({gemm.args[2]}); this pattern has none")
    weight = gemm.args[1]
    if not isinstance(weight, fx.Node) or weight.target is not aten.select.int or weight.args[1] != 0:
        raise Mismatch(gemm, f"the {role} weight is not one slice of a stacked [E, ...] tensor")
    stacked = weight.args[0]
    if not isinstance(stacked, fx.Node) or not is_weight(stacked):
        raise Mismatch(weight, f"the stacked {role} weight is computed in the graph, not a parameter")
    return gemm.args[0], stacked, weight.args[2]  # type: ignore[return-value]


def _check_experts(links: list[Link]) -> None:
    seen, n_experts = [link.expert for link in links], value(links[0].gate_up).shape[0]
    if seen != list(range(n_experts)):
        missing = sorted(set(range(n_experts)) - set(seen))
        what = f"misses {missing}" if missing else f"visits {seen}"
        raise Mismatch(links[-1].add, f"gate_up_proj holds {n_experts} experts, the loop {what}")


def _check_like_first(link: Link, first: Link) -> None:
    for field in ("experts", "weights", "x", "gate_up", "down"):
        mine, its = getattr(link, field), getattr(first, field)
        if same_tensor(mine) is not same_tensor(its):
            raise Mismatch(
                link.add, f"expert {link.expert} reads {mine.name} as {field}, expert {first.expert} {its.name}"
            )
    if fingerprint(link.activation, [link.hidden]) != fingerprint(first.activation, [first.hidden]):
        raise Mismatch(link.activated, f"expert {link.expert} has another activation than expert {first.expert}")


def _check_private(link: Link, chain: list[fx.Node]) -> None:
    """No value inside a turn may be used outside it: the operator does not give it out."""
    inside, _ = between(
        [link.add], lambda n: n in (link.x, link.experts, link.weights) or (n in chain and n is not link.add)
    )
    region = set(inside)
    for node in inside:
        if node is link.add:
            continue
        for user in node.users:
            if user not in region and not (is_symbol(user) or user.target is aten.unsqueeze.default):
                if _shared_between_turns(node):
                    continue
                raise Mismatch(node, f"{node.name} has another user, {user.name}: fused, it would not be there")


def _shared_between_turns(node: fx.Node) -> bool:
    """`weights[:, :, None]` may be written once for the whole loop."""
    return node.target is aten.unsqueeze.default and all(user.target is aten.index.Tensor for user in node.users)


def _result(tail: fx.Node, x: fx.Node) -> fx.Node:
    """The node that holds the sum in x's dtype: the sum itself, or the one cast that follows it."""
    dtype = value(x).dtype
    if value(tail).dtype == dtype:
        return tail
    users = list(tail.users)
    if len(users) == 1 and users[0].target is aten._to_copy.default and value(users[0]).dtype == dtype:
        return users[0]
    raise Mismatch(tail, f"the sum is used in {value(tail).dtype}, before it is rounded to {dtype}")
