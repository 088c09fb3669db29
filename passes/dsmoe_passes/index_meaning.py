"""What does an index tensor hold? The flat expert ids, their sorting permutation, its inverse, token numbers, offsets.

Dispatch is bookkeeping with integers that libraries spell in many ways. Each spelling is read into one `Meaning`, by
structure alone, so that it holds for any routing and any number of tokens. T tokens, K experts a token, E experts,
S = T K slots, in the order of `ids_TK.flatten()`.

  kind        holds                                                      source        number
  ids         ids_TK.flatten()                                           ids_TK
  slots       0 .. S-1
  order       the slots sorted by expert, `argsort(ids_S)`               the sort
  sorted      the ids in that order                                      the sort
  inverse     where each slot went, `argsort(order)`                     the sort
  tokens      the token of each slot, or of each sorted slot             None, a sort  K
  histogram   how many slots each expert has                             ids_TK        E
  offsets     where each expert's slots end among the sorted ones        ids_TK        E
  beyond      whether an id, or a sorted id, is number or more           ids_TK, sort  number
  clamped     the ids, or sorted ids, no larger than number - 1          ids_TK, sort  number
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from dsmoe_passes.region import argument, same_size

aten = torch.ops.aten
EXACT = {torch.int32, torch.int64, torch.float32, torch.float64}  # hold every expert id, slot and count
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default}
SAME = {aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default, aten.squeeze.dim}
SORTS = {aten.sort.default, aten.sort.stable}
ARGSORTS = {aten.argsort.default, aten.argsort.stable}


@dataclass(frozen=True)
class Meaning:
    """What a tensor of integers holds; see the module's table."""

    kind: str
    source: fx.Node | None = None
    number: int = 0


def meaning(node: object) -> Meaning | None:
    """What `node` holds, or None if that is nothing of dispatch."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    source = node.args[0] if node.args else None
    if node.target in RESHAPES or node.target in SAME:
        return _reshaped(node, source)
    if node.target is aten._to_copy.default:
        return meaning(source) if _dtype(node) in EXACT else None
    if node.target is operator.getitem:
        return _of_sort(node)
    if node.target in ARGSORTS:
        return _argsort(node)
    read = READERS.get(node.target)
    return read(node) if read else None


def ids_of(sort: fx.Node) -> fx.Node | None:
    """The `[T, K]` ids that `sort` sorts."""
    found = meaning(sort.args[0])
    return found.source if found and found.kind == "ids" else None


def _shape(node: object) -> torch.Size:
    return node.meta["val"].shape  # type: ignore[attr-defined, no-any-return]


def _dtype(node: object) -> torch.dtype:
    return node.meta["val"].dtype  # type: ignore[attr-defined, no-any-return]


def _reshaped(node: fx.Node, source: object) -> Meaning | None:
    """`ids_TK.view(-1)`, `tokens_T1.expand(T, K).view(-1)`, or a reshape of what has a meaning, which keeps it."""
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    if len(_shape(node)) == 1 and len(_shape(source)) == 2:
        rows = _repeated_rows(source)
        if rows is not None:
            return rows
        inner = meaning(source)
        if inner is not None:
            return inner
        return Meaning("ids", source) if _dtype(source) in (torch.int32, torch.int64) else None
    return meaning(source)


def _repeated_rows(node: fx.Node) -> Meaning | None:
    """`arange(T)[:, None].expand(T, K)`: the token of each slot."""
    while node.target in SAME and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.target is not aten.expand.default or not isinstance(_shape(node)[1], int):
        return None
    column = node.args[0]
    found = meaning(column)
    if found == Meaning("slots") and len(_shape(column)) == 2 and same_size(_shape(column)[1], 1):
        return Meaning("tokens", None, _shape(node)[1])
    return None


def _of_sort(node: fx.Node) -> Meaning | None:
    sort = node.args[0]
    if not isinstance(sort, fx.Node) or sort.target not in SORTS or not _ascending(sort):
        return None
    inner = meaning(sort.args[0])
    if inner is None or inner.kind == "order":
        return Meaning("inverse", inner.source) if inner and node.args[1] == 1 else None
    return Meaning("sorted" if node.args[1] == 0 else "order", sort) if inner.kind == "ids" else None


def _argsort(node: fx.Node) -> Meaning | None:
    inner = meaning(node.args[0])
    if inner is None or not _ascending(node):
        return None
    if inner.kind == "order":
        return Meaning("inverse", inner.source)
    return Meaning("order", node) if inner.kind == "ids" else None


def _ascending(sort: fx.Node) -> bool:
    return not argument(sort, 2, "descending", False) and len(_shape(sort.args[0])) == 1


def _floor_divide(node: fx.Node) -> Meaning | None:
    rounding = node.kwargs.get("rounding_mode", "floor")
    inner, by = meaning(node.args[0]), node.args[1]
    if inner is None or not isinstance(by, int) or by < 1 or rounding not in ("floor", "trunc"):
        return None
    if inner.kind == "slots":
        return Meaning("tokens", None, by)
    return Meaning("tokens", inner.source, by) if inner.kind == "order" else None


def _index(node: fx.Node) -> Meaning | None:
    """One index tensor read at the places of another."""
    if node.target is aten.index.Tensor:
        places = list(node.args[1])  # type: ignore[arg-type]
        at = meaning(places[0]) if len(places) == 1 else None
    else:
        at = meaning(node.args[2]) if node.args[1] == 0 else None
    inner = meaning(node.args[0])
    if at is None or inner is None or at.kind != "order" or at.source is None:
        return None
    if inner.kind == "ids" and ids_of(at.source) is inner.source:
        return Meaning("sorted", at.source)
    if inner.kind == "tokens" and inner.source is None:
        return Meaning("tokens", at.source, inner.number)
    return Meaning("order", at.source) if inner.kind == "slots" else None


def _arange(node: fx.Node) -> Meaning | None:
    start, step = (0, 1) if len(node.args) < 2 else (node.args[0], node.args[2] if len(node.args) > 2 else 1)
    return Meaning("slots") if (start, step) == (0, 1) else None


def _scattered(node: fx.Node) -> Meaning | None:
    """`empty[order] = arange(S)`: the inverse. Every place is written once, so what was there before is no matter."""
    base = node.args[0]
    if node.target is aten.index_put.default:
        places, values, accumulate = list(node.args[1]), node.args[2], argument(node, 3, "accumulate", False)  # type: ignore[arg-type]
        place = places[0] if len(places) == 1 else None
    else:
        place, values, accumulate = node.args[2], node.args[3], node.args[1] != 0
    at, what = meaning(place), meaning(values)
    if at is None or at.kind != "order" or what != Meaning("slots") or accumulate or base is None:
        return None
    sizes = [_shape(n)[0] for n in (base, place, values)]
    if _dtype(node) not in EXACT or not (same_size(sizes[0], sizes[1]) and same_size(sizes[1], sizes[2])):
        return None
    return Meaning("inverse", at.source)


def _histogram(node: fx.Node) -> Meaning | None:
    inner = meaning(node.args[0])
    ids = None if inner is None else ids_of(inner.source) if inner.kind == "sorted" else inner.source  # type: ignore[arg-type]
    if inner is None or inner.kind not in ("ids", "sorted") or ids is None:
        return None
    if node.target is aten.bincount.default:
        bins, weights = argument(node, 2, "minlength", 0), argument(node, 1, "weights")
        return Meaning("histogram", ids, bins) if isinstance(bins, int) and bins and weights is None else None
    bins, low, high = argument(node, 1, "bins", 100), argument(node, 2, "min", 0), argument(node, 3, "max", 0)
    if not isinstance(bins, int) or low != 0 or high != bins - 1:
        return None
    return Meaning("histogram", ids, bins)


def _counted(node: fx.Node) -> Meaning | None:
    """`one_hot(ids, E).sum(0)`."""
    hot = node.args[0]
    while isinstance(hot, fx.Node) and hot.target is aten._to_copy.default:
        hot = hot.args[0]
    if not isinstance(hot, fx.Node) or hot.target is not aten.one_hot.default or argument(node, 1, "dim") != [0]:
        return None
    inner, classes = meaning(hot.args[0]), argument(hot, 1, "num_classes", -1)
    if inner is None or not isinstance(classes, int) or classes <= 0 or len(_shape(node)) != 1:
        return None
    ids = ids_of(inner.source) if inner.kind == "sorted" else inner.source if inner.kind == "ids" else None  # type: ignore[arg-type]
    return Meaning("histogram", ids, classes) if ids is not None and _dtype(node) in EXACT else None


def _cumsum(node: fx.Node) -> Meaning | None:
    inner = meaning(node.args[0])
    if inner is None or inner.kind != "histogram" or argument(node, 1, "dim") not in (0, -1):
        return None
    return Meaning("offsets", inner.source, inner.number) if _dtype(node) in EXACT else None


def _beyond(node: fx.Node) -> Meaning | None:
    inner, limit = meaning(node.args[0]), node.args[1]
    if inner is None or inner.kind not in ("ids", "sorted") or not isinstance(limit, int):
        return None
    return Meaning("beyond", inner.source, limit)


def _clamped(node: fx.Node) -> Meaning | None:
    inner, low, high = meaning(node.args[0]), argument(node, 1, "min"), argument(node, 2, "max")
    if inner is None or inner.kind not in ("ids", "sorted") or low not in (None, 0) or not isinstance(high, int):
        return None
    return Meaning("clamped", inner.source, high + 1)


READERS: dict[object, Callable[[fx.Node], Meaning | None]] = {
    aten.floor_divide.default: _floor_divide,
    aten.div.Tensor_mode: _floor_divide,
    aten.index.Tensor: _index,
    aten.index_select.default: _index,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.index_put.default: _scattered,
    aten.scatter.src: _scattered,
    aten.histc.default: _histogram,
    aten.bincount.default: _histogram,
    aten.sum.dim_IntList: _counted,
    aten.cumsum.default: _cumsum,
    aten.ge.Scalar: _beyond,
    aten.clamp.default: _clamped,
}
