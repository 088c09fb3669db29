"""Rotations of whole heads as a product of complex numbers (DeepSeek-V2), in one operator; ONNX has no complex numbers.

    view_as_real(view_as_complex(x as [B, heads, S, D/2, 2]) * polar(1, a))   ->   RotaryEmbedding(x, cos a, sin a)

with its neighbours as pairs ("interleaved"). B sequences, S positions, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dsmoe_compiler.targets.onnx.nodes import Node, computed, is_node, shape
from dsmoe_compiler.targets.onnx.rotation import ROTARY

aten = torch.ops.aten


def rotate_complex(graph: fx.GraphModule) -> None:
    """Rewrite `graph` in place."""
    tables: dict[tuple[Node, Any], tuple[Node, Node]] = {}
    for node in graph.graph.find_nodes(op="call_function", target=aten.view_as_real.default):
        found = turn(node.args[0])
        if found is None:
            continue
        pairs, polar, scale = found
        x = pairs.args[0]
        with graph.graph.inserting_before(node):
            cos, sin = table(graph.graph, polar, scale, x, tables)
            rotated = graph.graph.call_function(ROTARY, (x, cos, sin), {"interleaved": True})
            rotated.meta = dict(x.meta)
            again = graph.graph.call_function(aten.view.default, (rotated, pairs.args[1]))
        again.meta = dict(node.meta)
        node.replace_all_uses_with(again)


def turn(node: Node) -> tuple[Node, Node, float] | None:
    """The view of `x [B, heads, S, D]` as pairs, the `polar` it is multiplied with, and by how much that is scaled."""
    if node.target is not aten.mul.Tensor:
        return None
    for number, other in (node.args, node.args[::-1]):
        if not is_node(number) or number.target is not aten.view_as_complex.default:
            continue
        pairs = number.args[0]
        if pairs.target is not aten.view.default or len(shape(pairs.args[0])) != 4 or len(shape(pairs)) != 5:
            continue
        scale, over_heads = 1.0, False
        while is_node(other) and other.target is not aten.polar.default:
            if other.target is aten.mul.Tensor and isinstance(other.args[1], int | float):
                scale *= other.args[1]
            elif other.target is aten.unsqueeze.default and other.args[1] == 1:
                over_heads = True
            elif other.target not in (aten._to_copy.default, aten.alias.default):
                break
            other = other.args[0]
        if over_heads and is_node(other) and other.target is aten.polar.default:
            return pairs, other, scale
    return None


def table(
    graph: fx.Graph, polar: Node, scale: float, x: Node, done: dict[tuple[Node, Any], tuple[Node, Node]]
) -> tuple[Node, Node]:
    """cos and sin `[B, S, D/2]` of a table of angles, made once where they are first needed."""
    key = (polar, scale)
    if key not in done:
        size, angle = polar.args
        batch = computed(graph, aten.sym_size.int, (x, 0))
        parts = []
        for function in (aten.cos.default, aten.sin.default):
            part = computed(graph, function, (angle,))
            if size.target is not aten.ones_like.default:
                part = computed(graph, aten.mul.Tensor, (part, size))
            if scale != 1.0:
                part = computed(graph, aten.mul.Tensor, (part, scale))
            parts.append(computed(graph, aten.expand.default, (part, [batch, -1, -1])))
        done[key] = (parts[0], parts[1])
    return done[key]
