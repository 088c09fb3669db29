"""From the experts' answers to the sum over each token's slots: weights, inverse permutation, view, sum.

    p_SH = mul(answers_SH, weights_TK.flatten()[order][:, None])     rows may lie in the order of a sort,
    q_SH = p_SH[inverse]                                             or in that of the slots
    y_TH = q_SH.view(T, K, H).sum(1)

The steps may come in another order and with casts between them; each is read off the node that uses the one before.
S = T K slots, H model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from dsmoe_passes.experts_match import Layer, are_zeros, keeps_precision, only_user
from dsmoe_passes.experts_rows import GATHERS, VIEWS, Rows, places_of, read_weights
from dsmoe_passes.index_meaning import Meaning, meaning
from dsmoe_passes.region import argument, same_size, value
from dsmoe_passes.result import Mismatch

aten = torch.ops.aten


@dataclass(frozen=True)
class Combined:
    """The sum, and the routing weights that the answers were weighted with."""

    total: fx.Node
    weights: fx.Node
    weights_dtype: torch.dtype


def combine(answers: fx.Node, sort: fx.Node | None, layer: Layer) -> Combined:
    """Read forward from the experts' `answers`, whose rows lie in the order of `sort`.

    Raises: Mismatch at the first step that is no part of a weighted sum over the slots of each token.
    """
    dtype, top_k = value(answers).dtype, layer.top_k
    node, weights, grouped, done = answers, None, False, False
    while not done:
        user = only_user(node, "an expert's output")
        if user.target is aten.mul.Tensor and weights is None:
            weights = _weights(user, node, sort, layer)
        elif user.target in GATHERS and user.args[0] is node and not grouped:
            _check_restored(user, sort)
            sort = None
        elif user.target is aten.index_put.default and not grouped:
            _check_put_back(user, node, sort)
            sort = None
        elif user.target in (*VIEWS, aten.unsqueeze.default) and not grouped:
            grouped = _is_grouped(user, value(node).shape[-1], top_k, sort)
        elif user.target is aten.sum.dim_IntList and grouped:
            done = _sums_slots(user)
        elif user.target is aten.index_add.default and user.args[3] is node and not grouped:
            done = _adds_by_token(user, sort, top_k)
        elif not (user.target is aten._to_copy.default or layer.masks_strangers(user, node, sort)):
            when = "after it was weighted" if weights else "before it is weighted"
            because = f"{user.name} ({user.target}) changes an expert's output {when}; dsmoe::experts has nothing there"
            raise Mismatch(user, because)
        node = user
        keeps_precision(node, dtype)
    if weights is None:
        raise Mismatch(node, "the experts' outputs are summed without their routing weights")
    return Combined(node, weights.source, weights.dtype)


def _weights(product: fx.Node, node: fx.Node, sort: fx.Node | None, layer: Layer) -> Rows:
    """The `[T, K]` weights of `rows * weights[:, None]`, whose rows must lie in the same order."""
    other = next((a for a in product.args if a is not node), None)
    if not isinstance(other, fx.Node) or value(product).dim() != value(node).dim():
        raise Mismatch(product, f"an expert's output is multiplied by {other}, not by its routing weight")
    found = read_weights(other, layer, sort)
    if found.sort is not sort:
        order = f"the rows are in the order of {_order(sort)}, their weights in that of {_order(found.sort)}"
        raise Mismatch(product, order)
    shape, wanted = value(found.source).shape, value(layer.ids).shape
    if not all(map(same_size, shape, wanted)):
        raise Mismatch(found.source, f"routing weights are {tuple(shape)} and expert ids {tuple(wanted)}")
    return found


def _order(sort: fx.Node | None) -> str:
    return "the slots" if sort is None else f"the sort {sort.name}"


def _check_restored(user: fx.Node, sort: fx.Node | None) -> None:
    """`rows[inverse]`: back in the order of the slots."""
    places = places_of(user)
    found = meaning(places)
    if sort is None or found is None or found.kind != "inverse":
        raise Mismatch(user, f"the rows are gathered by {places}, which is not the inverse of the sort")
    if found != Meaning("inverse", sort):
        raise Mismatch(user, f"the rows are in the order of {sort.name}, {places} is the inverse of another sort")


def _check_put_back(user: fx.Node, node: fx.Node, sort: fx.Node | None) -> None:
    """`empty[order] = rows`: back in the order of the slots."""
    base, places = user.args[0], places_of(user)
    if sort is None or user.args[2] is not node or argument(user, 3, "accumulate", False):
        raise Mismatch(user, "the rows are not put back to their slots, one by one")
    if meaning(places) != Meaning("order", sort):
        raise Mismatch(user, f"the rows are in the order of {sort.name}, they are put back by {places}")
    if not isinstance(base, fx.Node) or not all(map(same_size, value(base).shape, value(node).shape)):
        raise Mismatch(user, "the rows are put into a tensor of another shape")


def _is_grouped(user: fx.Node, width: object, top_k: object, sort: fx.Node | None) -> bool:
    """Whether a view makes `[T, K, H]` of the rows; one that keeps `[S, H]` is no matter."""
    shape = value(user).shape
    if len(shape) == 2 and same_size(shape[-1], width):
        return False
    if len(shape) != 3 or not same_size(shape[1], top_k) or not same_size(shape[2], width):
        raise Mismatch(user, f"the rows are viewed as {tuple(shape)}, not as [T, {top_k}, {width}]")
    if sort is not None:
        raise Mismatch(user, "the rows are summed in the order of the sort, not in that of the slots")
    return True


def _sums_slots(user: fx.Node) -> bool:
    dims, keep = argument(user, 1, "dim"), argument(user, 2, "keepdim", False)
    if not isinstance(dims, list | tuple) or [d % 3 for d in dims] != [1] or keep:
        raise Mismatch(user, f"the sum is over dimension {dims}; the slots of a token are dimension 1")
    return True


def _adds_by_token(user: fx.Node, sort: fx.Node | None, top_k: int) -> bool:
    """`zeros.index_add(0, tokens, rows)`."""
    if user.args[1] != 0 or user.kwargs.get("alpha", 1) != 1:
        raise Mismatch(user, "the experts' outputs are not added row by row with factor 1")
    if meaning(user.args[2]) != Meaning("tokens", sort, top_k):
        raise Mismatch(user, f"the experts' outputs are added at {user.args[2]}, which is not the token of each row")
    if not are_zeros(user.args[0]):
        raise Mismatch(user, "the sum over experts does not start from zeros")
    return True
