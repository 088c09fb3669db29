"""Rows for the experts: a token's row, or its routing weights, once for each of its slots, in some order.

  x_TH[order // K]                   rows in the order of a sort of the expert ids
  repeat_interleave(x_TH, K, 0)      rows in the order of the slots
  weights_TK.flatten()[order]        the same of the routing weights
T tokens, K experts a token, S = T K slots, H model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from dsmoe_passes.experts_match import Layer
from dsmoe_passes.index_meaning import meaning
from dsmoe_passes.region import same_size, value
from dsmoe_passes.result import Mismatch

aten = torch.ops.aten
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
IDLE = {aten.clone.default, aten.contiguous.default}
COLUMNS = VIEWS | IDLE | {aten.unsqueeze.default, aten.squeeze.dim}
GATHERS = {aten.index.Tensor, aten.index_select.default}


@dataclass(frozen=True)
class Rows:
    """`source` `[T, ...]` spread over the slots, in the order of `sort` (None: of the slots), rounded to `dtype`."""

    source: fx.Node
    sort: fx.Node | None
    dtype: torch.dtype


def places_of(gather: fx.Node) -> fx.Node | None:
    """The one index tensor by which `gather` picks along its first dimension."""
    if gather.target is aten.index_select.default:
        return gather.args[2] if gather.args[1] == 0 else None  # type: ignore[return-value]
    places = list(gather.args[1])  # type: ignore[arg-type]
    return places[0] if len(places) == 1 else None


def narrower(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The dtype that rounds more: a wider one after it changes nothing."""
    return other if torch.promote_types(one, other) == one else one


def read_rows(node: fx.Node, layer: Layer) -> Rows:
    """What the first GEMM reads: the tokens `[T, H]` and the order of their rows. Raises: Mismatch."""
    top, masks = node, []
    while node.target is aten.masked_fill.Scalar and isinstance(node.args[0], fx.Node):
        masks.append(node)
        node = node.args[0]
    rows = _read_rows(node, layer.top_k)
    for mask in masks:
        if not layer.masks_strangers(mask, mask.args[0], rows.sort):  # type: ignore[arg-type]
            raise Mismatch(top, f"{mask.name} fills rows of the tokens by {mask.args[1]}")
    return rows


def _read_rows(node: fx.Node, top_k: int) -> Rows:
    dtype = value(node).dtype
    while True:
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, fx.Node):
            raise Mismatch(node, f"the first GEMM reads {node.name}, not the rows of the chosen tokens")
        if node.target is aten._to_copy.default:
            dtype = narrower(dtype, value(source).dtype)
        elif node.target in VIEWS and value(source).dim() in (3, 4):
            return Rows(_spread(source, node, top_k), None, dtype)
        elif node.target not in IDLE:
            break
        node = source
    if node.target is aten.repeat_interleave.self_int:
        repeats, dim = node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        if repeats != top_k or dim not in (0, -value(source).dim()):
            raise Mismatch(node, f"rows are repeated {repeats} times along {dim}, tokens choose {top_k} experts")
        return Rows(source, None, dtype)
    if node.target in GATHERS:
        return _gathered(node, source, top_k, dtype)
    if node.target is aten.mul.Tensor:
        because = "what the experts read is scaled first (weights on their input); dsmoe::experts weights their output"
        raise Mismatch(node, because)
    raise Mismatch(node, f"the first GEMM reads {node.name} ({node.target}), not the rows of the chosen tokens")


def _gathered(node: fx.Node, source: fx.Node, top_k: int, dtype: torch.dtype) -> Rows:
    found = meaning(places_of(node))
    if found is None or found.kind not in ("tokens", "order"):
        raise Mismatch(node, f"rows are gathered by {places_of(node)}, not by the token of each chosen expert")
    if found.kind == "order":
        rows = _read_rows(source, top_k)
        if rows.sort is not None:
            raise Mismatch(node, "the rows are sorted twice")
        return Rows(rows.source, found.source, narrower(dtype, rows.dtype))
    if found.number != top_k:
        raise Mismatch(node, f"rows are those of slot // {found.number}, but tokens choose {top_k} experts")
    return Rows(source, found.source, dtype)


def _spread(source: fx.Node, view: fx.Node, top_k: int) -> fx.Node:
    """`x[:, None].expand(T, K, H).view(T * K, H)`: x."""
    node = source
    while node.target in IDLE and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    column = node.args[0] if node.target is aten.expand.default else None
    if isinstance(column, fx.Node) and column.target in (aten.unsqueeze.default, *VIEWS):
        x, wide, thin = column.args[0], value(node).shape, value(column).shape
        spread = len(wide) == 3 and wide[1] == top_k and same_size(thin[1], 1) and value(view).dim() == 2
        if isinstance(x, fx.Node) and spread and value(x).dim() == 2 and same_size(value(x).shape[0], thin[0]):
            return x
    raise Mismatch(view, f"the first GEMM reads {view.name}, a view of {source.name}, not the rows of chosen tokens")


def read_weights(node: fx.Node, layer: Layer, order: fx.Node | None) -> Rows:
    """What an expert's output is multiplied by: the `[T, K]` routing weights and the order of their rows.

    They may be zeroed where an id is no expert's; `order` is the sort of the rows.
    Raises: Mismatch if `node` is not one number a row, or anything else is done to it on the way.
    """
    top, sort, dtype = node, None, value(node).dtype
    if value(node).dim() < 2 or not same_size(value(node).shape[-1], 1):
        raise Mismatch(node, f"an expert's output is multiplied by {node.name} {tuple(value(node).shape)}")
    if value(node).dim() == 3:
        return _slots(node, dtype)
    while True:
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, fx.Node):
            break
        if node.target in GATHERS:
            found = meaning(places_of(node))
            if sort is not None or found is None or found.kind != "order":
                because = f"the routing weights are gathered by {places_of(node)}, not by the sort of the expert ids"
                raise Mismatch(node, because)
            sort = found.source
        elif node.target is aten._to_copy.default:
            dtype = narrower(dtype, value(source).dtype)
        elif node.target in VIEWS and _flattens(node, source, layer.top_k):
            return Rows(source, sort, dtype)
        elif not (node.target in COLUMNS or layer.masks_strangers(node, source, order if sort is None else None)):
            break
        node = source
    because = f"an expert's output is multiplied by {top.name}, which is no routing weight ({node.name})"
    raise Mismatch(top, because)


def _flattens(node: fx.Node, source: fx.Node, top_k: int) -> bool:
    """Whether `node` is `[T, K]` flattened, to `[S]` or to `[S, 1]`."""
    return value(source).dim() == 2 and value(source).shape[-1] == top_k and (value(node).dim() == 1 or top_k > 1)


def _slots(node: fx.Node, dtype: torch.dtype) -> Rows:
    """`weights_TK[:, :, None]`."""
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target is aten._to_copy.default:
        dtype, source = narrower(dtype, value(source).dtype), source.args[0]
    if node.target not in COLUMNS or not isinstance(source, fx.Node) or value(source).dim() != 2:
        raise Mismatch(node, f"an expert's output is multiplied by {node.name}, which is not its routing weight")
    return Rows(source, None, dtype)
