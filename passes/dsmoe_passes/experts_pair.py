"""Two GEMMs over the rows of all experts, and what lies before, between and behind them: one dsmoe::experts.

    hidden_SN = gemm(rows_SH, gate_up) + gate_up_bias[expert of the row]
    out_SH    = gemm(activation(hidden_SN), down) + down_bias[expert of the row]

The dispatch is checked by structure (`index_meaning`, `experts_rows`, `experts_combine`), so that it holds for any
routing; the activation is recognised by what it computes. S = T K rows, H model width, N = I, or 2 I with a gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from dsmoe_passes import activations
from dsmoe_passes.activations import Activation
from dsmoe_passes.experts_combine import combine
from dsmoe_passes.experts_match import VIEWS, Layer, Match, result_of
from dsmoe_passes.experts_rows import GATHERS, places_of, read_rows
from dsmoe_passes.index_meaning import Meaning, ids_of, meaning
from dsmoe_passes.region import argument, between, is_symbol, is_weight, same_size, value
from dsmoe_passes.result import Mismatch

aten = torch.ops.aten
STOPS = GATHERS | {
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
    aten.repeat_interleave.self_int,
    aten.expand.default,
    aten.linear.default,
    aten.embedding.default,
}


@dataclass(frozen=True)
class Gemm:
    """One GEMM over the rows of all experts; `grouping` is what it takes each row's expert from."""

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    transposed: bool
    grouping: Meaning

    @property
    def width(self) -> int:
        """How many numbers it gives a row."""
        return value(self.weight).shape[2 if self.transposed else 1]


def firsts_of(second: fx.Node, is_gemm: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The GEMMs over experts whose outputs `second` reads; none, if it is a first one itself."""
    operands = [node for node in second.all_input_nodes[:2] if not is_symbol(node)]
    _, leaves = between(operands, lambda n: n.target in STOPS or (n is not second and is_gemm(n)))
    return [node for node in leaves if is_gemm(node)]


def read_pair(firsts: list[fx.Node], node: fx.Node, read_gemm: Callable[[fx.Node], Gemm], spelling: str) -> Match:
    """The experts whose second GEMM is `node`. Raises: Mismatch with the reason, if they are otherwise."""
    if len(firsts) != 1:
        names = ", ".join(first.name for first in firsts)
        because = f"the second GEMM reads {len(firsts)} GEMMs ({names}); dsmoe::experts wants gate and up in one tensor"
        raise Mismatch(node, because)
    first, second = read_gemm(firsts[0]), read_gemm(node)
    ids = _same_ids(first, second)
    if value(ids).dim() != 2:
        raise Mismatch(ids, f"expert ids must have shape [T, K], got {tuple(value(ids).shape)}")
    layer = Layer(ids, value(first.weight).shape[0])
    rows = read_rows(first.rows, layer)
    if rows.sort is not None and ids_of(rows.sort) is not ids:
        raise Mismatch(first.rows, f"the rows are in the order of {rows.sort.name}, the groups are those of {ids.name}")
    own = Meaning("ids", ids) if rows.sort is None else Meaning("sorted", rows.sort)
    for gemm in (first, second):
        if gemm.grouping.kind != "offsets" and gemm.grouping != own:
            raise Mismatch(gemm.node, "the rows and the weights of this GEMM are in different orders")
        if gemm.grouping.kind == "offsets" and rows.sort is None:
            raise Mismatch(gemm.rows, "the rows are not sorted by expert, but the GEMM takes them in groups")
    x_shape = value(rows.source).shape
    if len(x_shape) != 2 or not same_size(x_shape[0], value(ids).shape[0]):
        raise Mismatch(rows.source, f"x is {tuple(x_shape)}, expert ids are {tuple(value(ids).shape)}")
    dtypes = [rows.dtype, value(first.weight).dtype, value(second.weight).dtype]
    if len(set(dtypes)) > 1:
        raise Mismatch(
            first.rows, f"rows and weights are {', '.join(map(str, dtypes))}; dsmoe::experts wants one dtype"
        )
    hidden, gate_up_bias = _with_bias(first, own, layer)
    answers, down_bias = _with_bias(second, own, layer)
    activation, layout = _activation(first, hidden, second)
    combined = combine(answers, rows.sort, layer)
    return Match(
        spelling=spelling,
        x=rows.source,
        experts=ids,
        weights=combined.weights,
        gate_up=first.weight,
        down=second.weight,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=activation,
        layout=layout,
        result=result_of(combined.total, rows.dtype),
        x_dtype=rows.dtype,
        weights_dtype=combined.weights_dtype,
    )


def _same_ids(first: Gemm, second: Gemm) -> fx.Node:
    found = []
    for gemm in (first, second):
        source = gemm.grouping.source
        found.append(ids_of(source) if gemm.grouping.kind == "sorted" and source is not None else source)
    if found[0] is None or found[0] is not found[1]:
        raise Mismatch(second.node, f"the two GEMMs group their rows by different ids, {found[0]} and {found[1]}")
    return found[0]


def _with_bias(gemm: Gemm, own: Meaning, layer: Layer) -> tuple[fx.Node, fx.Node | None]:
    """The GEMM's output `[S, N]` once its bias is added and rows of no expert are zeroed, and the `[E, N]` bias."""
    node, out, bias = gemm.node, gemm.node, None
    while True:
        users = [user for user in node.users if not is_symbol(user)]
        user = users[0] if len(users) == 1 else None
        if user is None:
            return out, bias
        if user.target in VIEWS and _is_row_view(user, gemm.width):
            pass
        elif user.target is aten.add.Tensor and bias is None:
            bias = _gathered_bias(user, node, own)
            if bias is None:
                return out, None
        elif not layer.masks_strangers(user, node, own.source if own.kind == "sorted" else None):
            return out, bias
        node = user
        if value(node).dim() == 2:
            out = node


def _is_row_view(node: fx.Node, width: int) -> bool:
    """Whether a view has the shape `[S, N]`, or that with a 1 in it."""
    shape = list(value(node).shape[1:])
    return len(shape) <= 2 and [size for size in shape if not same_size(size, 1)] == ([width] if width != 1 else [])


def _gathered_bias(add: fx.Node, node: fx.Node, own: Meaning) -> fx.Node | None:
    """The `[E, N]` parameter that `add` adds to each row of `node`, the one of the row's expert."""
    gather = next((a for a in add.args[:2] if a is not node), None)
    while isinstance(gather, fx.Node) and gather.target in VIEWS:
        gather = gather.args[0]
    if not isinstance(gather, fx.Node) or gather.target not in GATHERS:
        return None
    source = gather.args[0]
    if not isinstance(source, fx.Node) or not is_weight(source) or value(source).dim() != 2:
        return None
    places = places_of(gather)
    found = meaning(places)
    if found not in (own, Meaning("clamped", own.source, value(source).shape[0])):
        raise Mismatch(gather, f"the bias {source.name} is gathered by {places}, not by the expert of each row")
    dtypes = {value(n).dtype for n in (source, add, node)}
    if argument(add, 2, "alpha", 1) != 1 or len(dtypes) > 1:
        raise Mismatch(add, "the bias is scaled, or has another dtype than what it is added to")
    return source


def _activation(first: Gemm, hidden: fx.Node, second: Gemm) -> tuple[Activation, str]:
    """The activation between the two GEMMs, and the layout of the first one's weights."""
    if first.transposed != second.transposed:
        raise Mismatch(second.node, "one of the two stacked weights is transposed and the other is not")
    suffix = "_transposed" if first.transposed else ""
    rows, width = first.width, value(second.weight).shape[1 if second.transposed else 2]
    inside = _region(hidden, second.rows, second.node)
    if rows == width:
        return activations.identify_alone(inside, hidden, second.rows, width), "ungated" + suffix
    if rows != 2 * width:
        raise Mismatch(second.rows, f"the first GEMM gives {rows} numbers a row and the second takes {width}")
    found, layout = activations.identify_joined(inside, hidden, second.rows, rows)
    return found, layout + suffix


def _region(hidden: fx.Node, result: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes from `hidden` to `result`, in graph order. Raises: Mismatch if they read, or give, anything else."""
    ahead, todo = {hidden}, [hidden]
    while todo:
        for user in todo.pop().users:
            if user not in ahead and user < end:
                ahead.add(user)
                todo.append(user)
    inside: set[fx.Node] = set()
    todo = [result]
    while todo:
        node = todo.pop()
        if node in inside or node is hidden or is_symbol(node):
            continue
        if is_weight(node) or (node not in ahead and node.all_input_nodes):
            raise Mismatch(node, f"the activation reads {node.name} beside the first GEMM's output")
        inside.add(node)
        todo.extend(node.all_input_nodes)
    for node in inside | {hidden}:
        for user in node.users:
            if user not in inside and user is not end and not is_symbol(user) and not _leads_to(user, end):
                raise Mismatch(node, f"{node.name} has another user, {user.name}: fused, it would not be there")
    return sorted(inside)


def _leads_to(node: fx.Node, end: fx.Node) -> bool:
    """Whether `node` is a view of the rows for the second GEMM alone."""
    while node.target in VIEWS and len(node.users) == 1:
        node = next(iter(node.users))
        if node is end:
            return True
    return False
