"""The loop over experts as tracing unrolls it, once for each expert e = 0 .. E-1.

  y_TH    = zeros_like(x_TH, dtype=float32)
  t, k    = where(eq(experts_TK, e))                       the tokens that chose expert e, and in which slot
  h_n2I   = linear(index(x_TH, [t]), select(gate_up_E2IH, 0, e))
  a_nI    = activation(h_n2I)                              recognised by what it computes
  o_nH    = linear(a_nI, select(down_EHI, 0, e))
  y_TH    = index_add(y_TH, 0, t, o_nH.float() * index(weights_TK, [t, k])[:, None])

`where` may also look at one row of `one_hot(experts_TK).permute(2, 1, 0)`, the GEMMs may have biases `stacked[e]`, and
with weights `[E, H, 2I]` and `[E, I, H]` they are matmul(rows, stacked[e]).
T tokens, H model width, I expert width, E experts, K slots, n tokens of one expert.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from dsmoe_passes.activations import identify_alone, identify_joined
from dsmoe_passes.experts_match import Match, are_zeros, keeps_precision, result_of
from dsmoe_passes.region import between, fingerprint, is_symbol, is_weight, same_size, same_tensor, uncast, value
from dsmoe_passes.result import Mismatch

aten = torch.ops.aten
GEMMS = {aten.linear.default, aten.matmul.default, aten.mm.default}


@dataclass(frozen=True)
class Chosen:
    """The slots of one expert: `where`, the ids it looks at, the expert, and which output of it says what."""

    where: fx.Node
    experts: fx.Node
    expert: object
    token: int
    slot: int


@dataclass(frozen=True)
class Gemm:
    """`linear(rows, stacked[expert], bias[expert])`."""

    rows: fx.Node
    stacked: fx.Node
    bias: fx.Node | None
    transposed: bool
    expert: int


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
    gate_up_bias: fx.Node | None
    down_bias: fx.Node | None
    transposed: bool
    hidden: fx.Node
    activated: fx.Node
    activation: list[fx.Node]


def is_tail(node: fx.Node) -> bool:
    """The last of a chain of `index_add`: its sum feeds no further one."""
    return not any(user.target is aten.index_add.default and user.args[0] is node for user in node.users)


def read_loop(tail: fx.Node) -> Match | None:
    """The loop that ends in `tail`; None if `tail` is no loop over experts at all.

    Raises: Mismatch with the reason, if it is such a loop but not one that `dsmoe::experts` computes.
    """
    chain = _chain(tail)
    if not any(_chosen(add) for add in chain):
        return None
    links = [_read_turn(add) for add in chain]
    first = links[0]
    start = chain[0].args[0]
    if not are_zeros(start):
        raise Mismatch(chain[0], "the sum over experts does not start from zeros")
    _check_experts(links)
    for link in links[1:]:
        _check_like_first(link, first)
    for link in links:
        _check_private(link, chain)
    if len(first.gate_up.users) > len(links) or len(first.down.users) > len(links):
        raise Mismatch(first.gate_up, "the experts' weights have another user: packing them would pull the two apart")
    width, dtype = value(first.hidden).shape[-1], value(first.x).dtype
    tokens, shapes = value(first.experts).shape, (value(first.weights).shape, value(first.x).shape)
    if not all(map(same_size, shapes[0], tokens)) or len(shapes[1]) != 2 or not same_size(shapes[1][0], tokens[0]):
        because = f"x is {tuple(shapes[1])}, weights are {tuple(shapes[0])}, expert ids {tuple(tokens)}"
        raise Mismatch(first.x, because)
    if width == value(first.activated).shape[-1]:
        activation, layout = identify_alone(first.activation, first.hidden, first.activated, width), "ungated"
    else:
        activation, layout = identify_joined(first.activation, first.hidden, first.activated, width)
    return Match(
        spelling=f"loop over {len(links)} experts",
        x=first.x,
        experts=first.experts,
        weights=first.weights,
        gate_up=first.gate_up,
        down=first.down,
        gate_up_bias=first.gate_up_bias,
        down_bias=first.down_bias,
        activation=activation,
        layout=layout + ("_transposed" if first.transposed else ""),
        result=result_of(tail, dtype),
        x_dtype=dtype,
        weights_dtype=value(first.weights).dtype,
    )


def _chain(tail: fx.Node) -> list[fx.Node]:
    chain = [tail]
    while isinstance(chain[-1].args[0], fx.Node) and chain[-1].args[0].target is aten.index_add.default:
        chain.append(chain[-1].args[0])
    return chain[::-1]


def _chosen(add: fx.Node) -> Chosen | None:
    """How an `index_add` chooses its rows, if it does so by the expert."""
    where = add.args[2].args[0] if isinstance(add.args[2], fx.Node) and add.args[2].target is operator.getitem else None
    if not isinstance(where, fx.Node) or where.target not in (aten.where.default, aten.nonzero_numpy.default):
        return None
    mask = where.args[0]
    if not isinstance(mask, fx.Node) or not isinstance(mask.args[0], fx.Node):
        return None
    if mask.target is aten.eq.Scalar:
        return Chosen(where, mask.args[0], mask.args[1], 0, 1)
    hot = mask.args[0].args[0] if mask.args[0].target is aten.permute.default else None
    if mask.target is not aten.select.int or mask.args[1] != 0 or not isinstance(hot, fx.Node):
        return None
    if hot.target is not aten.one_hot.default or list(mask.args[0].args[1]) != [2, 1, 0]:  # type: ignore[arg-type]
        return None
    return Chosen(where, hot.args[0], mask.args[2], 1, 0)  # type: ignore[arg-type]


def _read_turn(add: fx.Node) -> Link:
    chosen = _chosen(add)
    if chosen is None:
        raise Mismatch(add, "one turn of the loop does not choose its tokens with where(experts == e)")
    experts, expert, token = chosen.experts, chosen.expert, add.args[2]
    ids = value(experts)
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64) or not isinstance(expert, int):
        raise Mismatch(experts, f"expert ids must be integers [T, K], got {ids.dtype} {tuple(ids.shape)}")
    if add.args[1] != 0 or add.kwargs.get("alpha", 1) != 1:
        raise Mismatch(add, "the experts' outputs are not added row by row with factor 1")
    if token.args[1] != chosen.token:  # type: ignore[union-attr]
        raise Mismatch(add, "the experts' outputs are added at their slots, not at their tokens")
    out, weights = _read_weighted(add.args[3], token, chosen)
    down = _read_gemm(out, "down")
    inside, leaves = between([down.rows], lambda n: n.target in GEMMS)
    gemms = [n for n in leaves if n.target in GEMMS]
    if len(gemms) != 1 or len(leaves) != 1:
        names = ", ".join(n.name for n in leaves)
        because = f"the activation must read one joined gate-and-up GEMM and nothing else, it reads {names}"
        raise Mismatch(down.rows, because)
    up = _read_gemm(gemms[0], "gate and up")
    if (up.expert, down.expert) != (expert, expert):
        raise Mismatch(out, f"tokens of expert {expert} meet gate_up_proj[{up.expert}] and down_proj[{down.expert}]")
    if up.transposed != down.transposed:
        raise Mismatch(out, "one of the two stacked weights is transposed and the other is not")
    return Link(
        add=add,
        expert=expert,
        experts=experts,
        weights=weights,
        x=_read_tokens(up.rows, token),
        gate_up=up.stacked,
        down=down.stacked,
        gate_up_bias=up.bias,
        down_bias=down.bias,
        transposed=up.transposed,
        hidden=gemms[0],
        activated=down.rows,
        activation=inside,
    )


def _read_tokens(rows: fx.Node, token: object) -> fx.Node:
    """`x[t]`, or `x[None, t].view(-1, H)`: x."""
    gather = rows
    if rows.target is aten.view.default and value(rows).dim() == 2:
        gather = rows.args[0]  # type: ignore[assignment]
    if gather.target is aten.index.Tensor:
        x, places = gather.args[0], list(gather.args[1])  # type: ignore[arg-type]
        if places == [token] and gather is rows:
            return x  # type: ignore[return-value]
        wide = isinstance(x, fx.Node) and x.target is aten.unsqueeze.default and x.args[1] == 0
        if places == [None, token] and wide and value(rows).shape[-1] == value(x).shape[-1]:  # type: ignore[arg-type]
            return x.args[0]  # type: ignore[union-attr, return-value]
    raise Mismatch(rows, "the first GEMM does not read the rows of the chosen tokens")


def _read_weighted(product: object, token: object, chosen: Chosen) -> tuple[fx.Node, fx.Node]:
    """`out.float() * weights[t, k][:, None]`, in either order: the GEMM's output, and the weights `[T, K]`."""
    if isinstance(product, fx.Node):
        product = uncast(product)
    if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor:
        node = product if isinstance(product, fx.Node) else chosen.where
        raise Mismatch(node, "an expert's output is not multiplied by its routing weight before it is added")
    factors = [factor for factor in product.args if isinstance(factor, fx.Node)]
    gemm = next((factor for factor in factors if uncast(factor).target in GEMMS), None)
    if gemm is None or len(factors) != 2:
        raise Mismatch(product, "neither factor of the weighted output is the down GEMM")
    weight = factors[1 - factors.index(gemm)]
    keeps_precision(product, value(uncast(gemm)).dtype)
    weights = _read_routing_weight(weight, token, chosen)
    return uncast(gemm), weights


def _read_routing_weight(weight: fx.Node, token: object, chosen: Chosen) -> fx.Node:
    """`index(unsqueeze(w, 2), [t, k])` or `unsqueeze(index(w, [t, k]), -1)`: the `[T, K]` weights."""
    if weight.target is aten.unsqueeze.default and weight.args[1] in (1, -1):
        picked, source = weight.args[0], None
    else:
        picked, source = weight, weight.args[0] if weight.args else None
    if not isinstance(picked, fx.Node) or picked.target is not aten.index.Tensor:
        raise Mismatch(weight, "the routing weight is not weights[token, slot]")
    at = list(picked.args[1])  # type: ignore[arg-type]
    slot = at[1] if len(at) == 2 else None
    if at[0] is not token or not isinstance(slot, fx.Node) or slot.args != (chosen.where, chosen.slot):
        raise Mismatch(picked, "the routing weight is read at other places than the chosen tokens and slots")
    if source is not None:
        if (
            not isinstance(source, fx.Node)
            or source.target is not aten.unsqueeze.default
            or source.args[1] not in (2, -1)
        ):
            raise Mismatch(picked, "the routing weight is not one number a row")
        return source.args[0]  # type: ignore[return-value]
    return picked.args[0]  # type: ignore[return-value]


def _read_gemm(gemm: fx.Node, role: str) -> Gemm:
    """`linear(rows, stacked[e], bias[e])`, or `matmul(rows, stacked[e])`."""
    if gemm.target not in GEMMS:
        raise Mismatch(gemm, f"the {role} GEMM is {gemm.target}, not aten.linear")
    stacked, expert = _slice_of(gemm, gemm.args[1], f"{role} weight", 3)
    bias = None
    if gemm.target is aten.linear.default and len(gemm.args) > 2 and gemm.args[2] is not None:
        bias, its = _slice_of(gemm, gemm.args[2], f"{role} bias", 2)
        if its != expert:
            raise Mismatch(gemm, f"the {role} weight is that of expert {expert}, its bias that of expert {its}")
    return Gemm(gemm.args[0], stacked, bias, gemm.target is not aten.linear.default, expert)  # type: ignore[arg-type]


def _slice_of(gemm: fx.Node, part: object, what: str, dims: int) -> tuple[fx.Node, int]:
    """`stacked[e]`: the stacked parameter and e."""
    if not isinstance(part, fx.Node) or part.target is not aten.select.int or part.args[1] != 0:
        raise Mismatch(gemm, f"the {what} is not one slice of a stacked [E, ...] tensor")
    stacked = part.args[0]
    if not isinstance(stacked, fx.Node) or not is_weight(stacked):
        raise Mismatch(part, f"the stacked {what} is computed in the graph, not a parameter")
    if value(stacked).dim() != dims:
        raise Mismatch(part, f"the stacked {what} has shape {tuple(value(stacked).shape)}, not {dims} dimensions")
    return stacked, part.args[2]  # type: ignore[return-value]


def _check_experts(links: list[Link]) -> None:
    seen, n_experts = [link.expert for link in links], value(links[0].gate_up).shape[0]
    if seen != list(range(n_experts)):
        missing = sorted(set(range(n_experts)) - set(seen))
        what = f"misses {missing}" if missing else f"visits {seen}"
        raise Mismatch(links[-1].add, f"gate_up_proj holds {n_experts} experts, the loop {what}")


def _check_like_first(link: Link, first: Link) -> None:
    for field in ("experts", "weights", "x", "gate_up", "down", "gate_up_bias", "down_bias", "transposed"):
        mine, its = (
            one if not isinstance(one, fx.Node) else same_tensor(one)
            for one in (getattr(link, field), getattr(first, field))
        )
        if mine is not its:
            because = f"expert {link.expert} reads {mine} as {field}, expert {first.expert} {its}"
            raise Mismatch(link.add, because)
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
    """`weights[:, :, None]` may be written once for the whole loop, and so may what only places the slots."""
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor) and not val.dtype.is_floating_point:
        return True
    return node.target is aten.unsqueeze.default and all(user.target is aten.index.Tensor for user in node.users)
