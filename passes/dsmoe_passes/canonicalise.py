"""One spelling for each thing: drop what computes nothing, and write casts, views and splits one way.

Before                                                      After
  a = aten.to.dtype(x, float32)                               a = aten._to_copy(x, dtype=float32)
  _assert_tensor_metadata(a, dtype=float32)                   v = aten.view(a, [-1, 16])
  v = aten.reshape(a, [-1, 16])                               g, u = aten.split(h, 8, -1)
  g, u = aten.chunk(h, 2, -1)
  i = aten.slice(ids, 0, 0, 9223372036854775807)
  m = aten.mul(w, 1.0)
  u0 = sym_size(where[0], 0); _assert_scalar(u0 >= 0)
  t = aten.div(slots, 2, rounding_mode="floor")             t = aten.floor_divide(slots, 2)
  c = aten.copy(part, source)                               c = source, cast and expanded to what part is

Removed: assertions about dtype and device (tracing has checked them), assertions that a size is not negative (none ever
is), casts to the dtype and views to the shape that is there, squeezes that undo an unsqueeze and the other way round,
slices of everything, products with the constant 1, clamps and masks of indices that lie in range anyway
(`index_ranges`). `aten.copy` goes because it has no derivative. Numbers do not change.
"""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx
from torch._prims_common import is_contiguous_or_false

from dsmoe_passes.index_ranges import is_false, is_idle_clamp, is_integer
from dsmoe_passes.region import call, is_weight, same_size
from dsmoe_passes.result import PassResult

aten = torch.ops.aten
END = torch.iinfo(torch.int64).max
ASSERTIONS = {aten._assert_tensor_metadata.default}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default}
VIEWS = {aten.reshape.default, aten._unsafe_view.default, aten.view.default}
SIZES = {aten.sym_size.int}
SCATTERS = {aten.slice_scatter.default, aten.select_scatter.default, aten.as_strided_scatter.default}


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
    source = node.args[0] if node.args else None
    if node.target in ASSERTIONS or _is_true_of_any_size(node) or (_is_promotion(node) and not node.users):
        graph.erase_node(node)
        return "assertion dropped"
    if not isinstance(source, fx.Node):
        return ""
    if node.target is aten.copy.default:
        return "copy replaced" if _replace_copy(graph, node, source) else ""
    same = source if _is_idle(node, source) else _undone(node, source)
    if same is not None and not _hands_input_out(node, same):
        node.replace_all_uses_with(same)
        return f"idle {str(node.target).split('.')[1]} dropped"
    if node.target in CASTS and _is_plain_cast(node):
        node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": node.meta["val"].dtype}
    elif node.target in VIEWS and _is_view(node, source):
        node.target = aten.view.default
    elif node.target is aten.chunk.default:
        _chunk_to_split(node, source)
    elif node.target is aten.div.Tensor_mode and node.kwargs.get("rounding_mode") == "floor" and is_integer(node):
        node.target, node.kwargs = aten.floor_divide.default, {}
    return ""


def _is_promotion(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "promote_types.default"


def _is_idle(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` hands on what `source` is."""
    if node.target is aten.slice.Tensor:
        return _slices_everything(node, source)
    if node.target in CASTS:
        return _is_plain_cast(node) and _same_dtype(source, node)
    if node.target in VIEWS:
        return _same_shape(source, node)
    if node.target is aten.squeeze.dim:
        size = source.meta["val"].shape[node.args[1]]
        return isinstance(size, int) and size != 1
    if node.target is aten.clamp.default:
        return is_idle_clamp(node)
    if node.target is aten.masked_fill.Scalar:
        return is_false(node.args[1]) and _same_shape(source, node)
    if node.target is aten.mul.Tensor:
        factor = node.args[1]
        return (
            isinstance(factor, int | float) and factor == 1 and bool(source.meta["val"].dtype == node.meta["val"].dtype)
        )
    return node.target is aten.alias.default


def _same_dtype(one: fx.Node, other: fx.Node) -> bool:
    return bool(one.meta["val"].dtype == other.meta["val"].dtype)


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    vals = [node.meta.get("val") for node in (one, other)]
    if not all(isinstance(val, torch.Tensor) for val in vals) or vals[0].dim() != vals[1].dim():  # type: ignore[union-attr]
        return False
    return all(map(same_size, vals[0].shape, vals[1].shape))  # type: ignore[union-attr]


def _undone(node: fx.Node, source: fx.Node) -> fx.Node | None:
    """What was there before an unsqueeze and a squeeze of one dimension, in whichever order."""
    squeezes = (aten.squeeze.dim, aten.unsqueeze.default)
    if node.target not in squeezes or source.target not in squeezes or node.target is source.target:
        return None
    before, wide = source.args[0], max(source.meta["val"].dim(), node.meta["val"].dim())
    if node.args[1] % wide != source.args[1] % wide or not _same_shape(before, node):  # type: ignore[operator, arg-type]
        return None
    return before  # type: ignore[return-value]


def _hands_input_out(node: fx.Node, source: fx.Node) -> bool:
    """Whether the graph would return an input itself, where it returns a new tensor now."""
    return is_weight(source) and any(user.op == "output" for user in node.users)


def _is_true_of_any_size(node: fx.Node) -> bool:
    if node.target is not aten._assert_scalar.default or not isinstance(node.args[0], fx.Node):
        return False
    condition = node.args[0]
    if condition.target is not operator.ge or not isinstance(condition.args[0], fx.Node):
        return False
    return condition.args[0].target in SIZES and condition.args[1:] == (0,)


def _is_plain_cast(node: fx.Node) -> bool:
    if node.target is aten.to.dtype:
        return len(node.args) == 2 and not any(node.kwargs.values())
    return {key for key, given in node.kwargs.items() if given is not None} == {"dtype"}


def _is_view(node: fx.Node, source: fx.Node) -> bool:
    """A reshape may be written as a view where its source is contiguous (otherwise it copies)."""
    val = source.meta.get("val")
    return node.target is not aten.reshape.default or (
        isinstance(val, torch.Tensor) and bool(is_contiguous_or_false(val))
    )


def _chunk_to_split(node: fx.Node, source: fx.Node) -> None:
    chunks, dim = node.args[1], node.args[2] if len(node.args) > 2 else 0
    size = source.meta["val"].shape[dim]
    if isinstance(size, int) and isinstance(chunks, int) and size % chunks == 0:
        node.target, node.args = aten.split.Tensor, (source, size // chunks, dim)


def _slices_everything(node: fx.Node, source: fx.Node) -> bool:
    given = list(node.args) + [None] * (5 - len(node.args))
    dim, start, end, step = given[1] or 0, given[2], given[3], given[4]
    size = source.meta["val"].shape[dim]
    whole = end is None or (isinstance(end, int) and (end == END or (isinstance(size, int) and end >= size)))
    return start in (None, 0) and whole and step in (None, 1)


def _replace_copy(graph: fx.Graph, node: fx.Node, part: fx.Node) -> bool:
    """Put what is copied in the place of `copy(part, source)`, with part's dtype and shape; strides if they count."""
    new = node.args[1]
    was, given = part.meta.get("val"), new.meta.get("val") if isinstance(new, fx.Node) else None
    if not isinstance(new, fx.Node) or not isinstance(was, torch.Tensor) or not isinstance(given, torch.Tensor):
        return False
    free_strides = all(user.target in SCATTERS and user.args[0] is not node for user in node.users)
    spreads = not _same_shape(part, new)
    if was.device != given.device or not (free_strides or is_contiguous_or_false(was)):
        return False
    if (spreads and not all(isinstance(n, int) for n in was.shape)) or _hands_input_out(node, new):
        return False
    if not _same_dtype(part, new):
        new = call(graph, aten._to_copy.default, (new,), before=node, like=node, kwargs={"dtype": was.dtype})
    if spreads:
        new = call(graph, aten.expand.default, (new, list(was.shape)), before=node, like=node)
    if not free_strides and not is_contiguous_or_false(new.meta["val"]):
        contiguous = {"memory_format": torch.contiguous_format}
        new = call(graph, aten.clone.default, (new,), before=node, like=node, kwargs=contiguous)
    node.replace_all_uses_with(new)
    return True
