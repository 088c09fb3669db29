"""A graph before it is divided: caches written where they lie, products as `linear`, rows side by side.

    copy_(cache, index_copy(cache, 2, slots, k))      ->  index_copy_(cache, 2, slots, k)
    mm(x, t(w)), matmul, addmm                        ->  linear(x, w, bias)
    attention(q, repeat_interleave(k), ...)           ->  attention(q, k, ..., enable_gqa=True)
    linear(transpose(x), w)                           ->  linear(clone(transpose(x)), w)

Numbers stay what they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dsmoe_compiler.targets.mlir.layout import buffer_of, root_of, tensor_of, view_of

aten, ops = torch.ops.aten, torch.ops.dsmoe
FLAT = (aten.linear.default, aten.topk.default)  # whose first argument may have any number of dimensions
ROWS = (*FLAT, ops.moe.default, ops.experts.default, ops.route.default, aten.scaled_dot_product_attention.default)


def prepared(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that is prepared; tensors are shared."""
    copy = fx.Graph()
    result: Any = copy.graph_copy(graph.graph, {})
    copy.output(result)
    module = fx.GraphModule(graph, copy)
    for node in list(copy.nodes):
        if node.target is aten.copy_.default:
            write_in_place(node)
        elif node.target in (aten.mm.default, aten.matmul.default, aten.addmm.default):
            as_linear(node)
        elif node.target is aten.scaled_dot_product_attention.default:
            share_keys(node)
    for node in list(copy.nodes):
        if node.target in ROWS:
            rows_in_order(node)
    copy.eliminate_dead_code()
    return module


def write_in_place(node: fx.Node) -> None:
    """Write slots of an input where they lie, if nobody reads what was there before."""
    target, value = node.args[:2]
    if not isinstance(value, fx.Node) or value.target is not aten.index_copy.default or value.args[0] is not target:
        return
    assert isinstance(target, fx.Node)
    order = {n: place for place, n in enumerate(node.graph.nodes)}
    if any(order[user] > order[value] for user in target.users if user is not node):
        return
    with node.graph.inserting_before(value):
        written = made(node.graph, aten.index_copy_.default, *value.args, value=target.meta["val"])
    value.replace_all_uses_with(written)
    node.replace_all_uses_with(written)
    node.graph.erase_node(node)
    node.graph.erase_node(value)


def as_linear(node: fx.Node) -> None:
    """A product with a matrix that lies as `nn.Linear` has it."""
    bias, (x, w) = (node.args[0], node.args[1:3]) if node.target is aten.addmm.default else (None, node.args[:2])
    assert isinstance(x, fx.Node)
    assert isinstance(w, fx.Node)
    value = tensor_of(w)
    if value is None or value.dim() != 2 or value.stride(0) != 1 or node.kwargs:
        return
    if bias is not None and (not isinstance(bias, fx.Node) or tensor_of(bias).dim() != 1):  # type: ignore[union-attr]
        return
    with node.graph.inserting_before(node):
        turned = made(node.graph, aten.t.default, w, value=value.t())
        product = made(node.graph, aten.linear.default, x, turned, bias, value=node.meta["val"])
    product.meta = {**node.meta}
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def share_keys(node: fx.Node) -> None:
    """Attention itself knows that several query heads share a key head."""
    sources = []
    for value in node.args[1:3]:
        if not isinstance(value, fx.Node) or value.target is not aten.repeat_interleave.self_int:
            return
        if len(value.args) < 3 or value.args[2] not in (1, -3) or tensor_of(value).dim() != 4:  # type: ignore[union-attr]
            return
        sources.append(value.args[0])
    node.args = (node.args[0], *sources, *node.args[3:])
    node.kwargs = {**node.kwargs, "enable_gqa": True}


def rows_in_order(node: fx.Node) -> None:
    """Copies of what a function cannot read where it lies."""
    for place, source in enumerate(node.args):
        value = tensor_of(source) if isinstance(source, fx.Node) else None
        if value is None or not value.dim():
            continue
        assert isinstance(source, fx.Node)
        root = tensor_of(root_of(source))
        assert root is not None
        view = view_of(value, buffer_of(root, source.name), root)
        if view.inner_is_one and (node.target not in FLAT or place or view.flat_rows() is not None):
            continue
        with node.graph.inserting_before(node):
            dense = value.contiguous() if not value.is_contiguous() else torch.empty_like(value)
            copied = made(node.graph, aten.clone.default, source, value=dense)
            copied.kwargs = {"memory_format": torch.contiguous_format}
        node.update_arg(place, copied)


def made(graph: fx.Graph, target: Any, *arguments: Any, value: Any) -> fx.Node:
    """A new call with its fake value."""
    node = graph.call_function(target, arguments)
    node.meta["val"] = value
    return node
