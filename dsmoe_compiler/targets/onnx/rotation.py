"""Rotations of whole heads, as transformers and the reference model write them, in one operator.

    x * cos + cat(-x2, x1) * sin                   ->   RotaryEmbedding(x, half of cos, half of sin)
    cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)   ->   RotaryEmbedding(cat(x1, x2), cos, sin)

x1, x2 are the halves of x along its last dimension; cos and sin of the first are tables whose halves are equal.

B sequences, S positions, D head width.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.onnx.ops  # registers the operators onnx::
from torch import fx

from dsmoe_compiler.targets.onnx.nodes import Node, computed, is_node, shape

aten = torch.ops.aten
ROTARY = torch.ops.onnx.RotaryEmbedding.opset23
SPLITS = (aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default)
# What leaves a table with equal halves one: it works on every element alike, or on other dimensions.
ALIKE = (
    aten.cos.default, aten.sin.default, aten.unsqueeze.default, aten._to_copy.default, aten.to.dtype,
    aten.mul.Tensor, aten.clone.default, aten.contiguous.default, aten.expand.default,
)  # fmt: skip


def rotate(graph: fx.GraphModule) -> None:
    """Rewrite `graph` in place."""
    halves: dict[tuple[Node, Any], Node] = {}
    for node in graph.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        found = rotation(node)
        if found is None:
            continue
        x, cos, sin = found
        with graph.graph.inserting_before(node):
            tables = [half(graph.graph, table, x, halves) for table in (cos, sin)]
            rotated = graph.graph.call_function(ROTARY, (x, *tables))
        rotated.meta = dict(node.meta)
        node.replace_all_uses_with(rotated)


def rotate_halves(graph: fx.GraphModule) -> None:
    """The second spelling, in place; x1 and x2 may have been taken from x in any way (DeepSeek-V3: even and odd)."""
    halves: dict[tuple[Node, Any], Node] = {}
    for node in graph.graph.find_nodes(op="call_function", target=aten.cat.default):
        found = rotated_halves(node)
        if found is None:
            continue
        first, second, *tables = found
        with graph.graph.inserting_before(node):
            (x, low), (other, high) = part(first), part(second)
            width = shape(node)[-1]
            if x is None or x is not other or (low, high) != ((0, width // 2), (width // 2, width)):
                x = computed(graph.graph, aten.cat.default, ([first, second], -1))
            cut = [half(graph.graph, table, x, halves) for table in tables]
            rotated = graph.graph.call_function(ROTARY, (x, *cut))
        rotated.meta = dict(node.meta)
        node.replace_all_uses_with(rotated)


def rotated_halves(node: Node) -> tuple[Node, Node, Node, Node] | None:
    """x1, x2, cos and sin, if `node` is `cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)`."""
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if len(parts) != 2 or len(shape(node)) != 4 or dim not in (-1, 3):
        return None
    minus, plus = parts
    if minus.target is not aten.sub.Tensor or plus.target is not aten.add.Tensor:
        return None
    products = [*minus.args, *plus.args]
    if len(products) != 4 or not all(is_node(p) and p.target is aten.mul.Tensor for p in products):
        return None
    (first, cos), (second, sin), *crossed = (p.args for p in products)
    tables = all(is_node(t) and is_half_table(t, first) for t in (cos, sin))
    return (first, second, cos, sin) if tables and crossed == [(second, cos), (first, sin)] else None


def is_half_table(node: Node, x: Node) -> bool:
    """Whether a node is `[S, D/2]` or `[B, 1, S, D/2]` for halves `[B, heads, S, D/2]`."""
    sizes = shape(node)
    return sizes[-1:] == shape(x)[-1:] and (len(sizes) == 2 or (len(sizes) == 4 and sizes[1] == 1))


def rotation(node: Node) -> tuple[Node, Node, Node] | None:
    """`x [B, heads, S, D]`, cos and sin, if `node` is their rotation."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for plain, turned in (node.args, node.args[::-1]):
        if not all(is_node(n) and n.target is aten.mul.Tensor for n in (plain, turned)):
            continue
        for swapped, sin in (turned.args, turned.args[::-1]):
            x = unswapped(swapped)
            if x is None or x not in plain.args or len(shape(x)) != 4:
                continue
            cos = plain.args[1 - plain.args.index(x)]
            if all(is_node(t) and is_table(t, x) for t in (cos, sin)):
                return x, cos, sin
    return None


def unswapped(node: Any) -> Node | None:
    """`x`, if `node` is `cat(-x2, x1)` of its halves."""
    if not is_node(node) or node.target is not aten.cat.default:
        return None
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if len(parts) != 2 or dim not in (-1, len(shape(node)) - 1):
        return None
    minus, first = parts
    if minus.target is not aten.neg.default:
        return None
    (source, low), (other, high) = part(first), part(minus.args[0])
    width = shape(node)[-1]
    return source if source is other and (low, high) == ((0, width // 2), (width // 2, width)) else None


def part(node: Node) -> tuple[Node | None, tuple[int, int]]:
    """The tensor that `node` is cut out of along the last dimension, and from where to where."""
    width = shape(node)[-1]
    if node.target is operator.getitem and node.args[0].target in SPLITS:
        cut, number = node.args[0], node.args[1]
        source = cut.args[0]
        dim = cut.args[2] if len(cut.args) > 2 else 0
        if dim in (-1, len(shape(source)) - 1) and shape(source)[-1] == 2 * width:
            return source, (number * width, (number + 1) * width)
    if node.target is aten.slice.Tensor:
        source, dim, start, end = (*node.args, *(0, None, None)[len(node.args) - 1 :])[:4]
        if dim in (-1, len(shape(node)) - 1) and (len(node.args) < 5 or node.args[4] == 1):
            whole = shape(source)[-1]
            start = 0 if start is None else start
            return source, (start, whole if end is None else min(end, whole))
    return None, (0, 0)


def is_table(node: Node, x: Node) -> bool:
    """Whether a table `[..., S, D]` (any heads alike) has two equal halves along its last dimension."""
    sizes = shape(node)
    if sizes[-1] != shape(x)[-1] or not (len(sizes) == 2 or (len(sizes) == 4 and sizes[1] == 1)):
        return False
    while node.target in ALIKE:
        if node.target is aten.mul.Tensor and is_node(node.args[1]):
            return False
        node = node.args[0]
    if node.target is not aten.cat.default or len(node.args) < 2:
        return False
    parts, dim = node.args
    return len(parts) == 2 and parts[0] is parts[1] and dim in (-1, len(shape(node)) - 1)


def half(graph: fx.Graph, table: Node, x: Node, done: dict[tuple[Node, Any], Node]) -> Node:
    """The first half of a table, or one of half the width, as `[B, S, D/2]`, made once."""
    sizes = shape(x)
    if table.target is aten.unsqueeze.default and len(shape(table)) == 4:
        table = table.args[0]
    key = (table, str(sizes[0]))
    if key not in done:
        cut = table
        if shape(table)[-1] == sizes[-1]:
            cut = computed(graph, aten.slice.Tensor, (table, -1, 0, sizes[-1] // 2))
        if len(shape(table)) == 2:
            cut = computed(graph, aten.unsqueeze.default, (cut, 0))
        elif len(shape(table)) == 4:
            cut = computed(graph, aten.squeeze.dim, (cut, 1))
        batch = computed(graph, aten.sym_size.int, (x, 0))
        done[key] = computed(graph, aten.expand.default, (cut, [batch, -1, -1]))
    return done[key]
