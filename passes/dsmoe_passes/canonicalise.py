"""One spelling for each thing: drop what computes nothing, and write casts, views and splits one way.

Before                                                      After
  a = aten.to.dtype(x, float32)                               a = aten._to_copy(x, dtype=float32)
  _assert_tensor_metadata(a, dtype=float32)                   v = aten.view(a, [-1, 16])
  v = aten.reshape(a, [-1, 16])                               g, u = aten.split(h, 8, -1)
  g, u = aten.chunk(h, 2, -1)
  i = aten.slice(ids, 0, 0, 9223372036854775807)
  m = aten.mul(w, 1.0)
  u0 = sym_size(where[0], 0); _assert_scalar(u0 >= 0)

Removed: assertions about dtype and device (tracing has checked them), assertions that a size is not negative (none ever
is), casts to the dtype that is there, slices of everything, products with the constant 1. Numbers do not change.
"""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx
from torch._prims_common import is_contiguous_or_false

from dsmoe_passes.region import is_symbol
from dsmoe_passes.result import PassResult

aten = torch.ops.aten
END = torch.iinfo(torch.int64).max
ASSERTIONS = {aten._assert_tensor_metadata.default}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default}
VIEWS = {aten.reshape.default, aten._unsafe_view.default, aten.view.default}
SIZES = {aten.sym_size.int}


def canonicalise(gm: fx.GraphModule) -> PassResult:
    """Rewrite `gm` in place; see the module's text for the list."""
    counts: Counter[str] = Counter()
    for node in list(gm.graph.nodes):
        if node.op == "call_function":
            counts[_canonicalise(gm.graph, node)] += 1
    del counts[""]
    gm.graph.eliminate_dead_code()
    return PassResult("canonicalise", removed=dict(sorted(counts.items())))


def _canonicalise(graph: fx.Graph, node: fx.Node) -> str:
    """Rewrite one node; the name of what was done to it, or nothing."""
    if node.target in ASSERTIONS or _is_true_of_any_size(node):
        graph.erase_node(node)
        return "assertion dropped"
    if getattr(node.target, "__name__", "") == "promote_types.default" and not node.users:
        graph.erase_node(node)
        return "assertion dropped"
    if node.target in CASTS and _is_plain_cast(node):
        source, dtype = node.args[0], _cast_dtype(node)
        if source.meta["val"].dtype == dtype:
            node.replace_all_uses_with(source)
            return "idle cast dropped"
        node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}
        return ""
    if node.target in VIEWS:
        node.target = aten.view.default if _viewable(node) else node.target
        return ""
    if node.target is aten.chunk.default:
        return _chunk_to_split(node)
    if node.target is aten.slice.Tensor and _slices_everything(node):
        node.replace_all_uses_with(node.args[0])
        return "idle slice dropped"
    if node.target is aten.mul.Tensor and node.args[1] == 1.0 and not isinstance(node.args[1], fx.Node):
        if node.args[0].meta["val"].dtype == node.meta["val"].dtype:
            node.replace_all_uses_with(node.args[0])
            return "product with 1 dropped"
    if node.target is aten.alias.default:
        node.replace_all_uses_with(node.args[0])
        return "alias dropped"
    return ""


def _is_true_of_any_size(node: fx.Node) -> bool:
    if node.target is not aten._assert_scalar.default or not isinstance(node.args[0], fx.Node):
        return False
    condition = node.args[0]
    return (
        condition.target is operator.ge
        and condition.args[1] == 0
        and isinstance(condition.args[0], fx.Node)
        and condition.args[0].target in SIZES
    )


def _is_plain_cast(node: fx.Node) -> bool:
    if node.target is aten.to.dtype:
        return len(node.args) == 2 and not any(node.kwargs.values())
    return set(k for k, v in node.kwargs.items() if v is not None) <= {"dtype"} and node.kwargs.get("dtype") is not None


def _cast_dtype(node: fx.Node) -> torch.dtype:
    return node.args[1] if node.target is aten.to.dtype else node.kwargs["dtype"]  # type: ignore[return-value]


def _viewable(node: fx.Node) -> bool:
    """A reshape may be written as a view where its source is contiguous (otherwise it copies)."""
    val = node.args[0].meta.get("val")
    return node.target is not aten.reshape.default or (isinstance(val, torch.Tensor) and is_contiguous_or_false(val))


def _chunk_to_split(node: fx.Node) -> str:
    source, chunks = node.args[0], node.args[1]
    dim = node.args[2] if len(node.args) > 2 else 0
    size = source.meta["val"].shape[dim]
    if isinstance(size, int) and isinstance(chunks, int) and size % chunks == 0:
        node.target, node.args = aten.split.Tensor, (source, size // chunks, dim)
    return ""


def _slices_everything(node: fx.Node) -> bool:
    source, dim, start, end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    if is_symbol(node) or isinstance(end, fx.Node) or isinstance(start, fx.Node):
        return False
    size = source.meta["val"].shape[dim or 0]
    whole = end is None or end == END or (isinstance(size, int) and end >= size)
    return start in (None, 0) and whole and step in (None, 1)
