"""Root-mean-square norms, as models spell them, in one operator.

    w * (x * rsqrt(mean(x * x) + eps))                      ->   rms_norm(x, w, eps), which is RMSNormalization
    w * (x32 * rsqrt(mean(x32 * x32) + eps)).to(x's dtype)   ->   the same; x32 is x in float32

RMSNormalization computes in float32 and rounds before it scales, as the second does. A model that scales in float32 and
then rounds keeps its casts, and the norm between them is in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dsmoe_compiler.targets.onnx.nodes import Node, computed, is_node, shape

aten = torch.ops.aten


def normalise(graph: fx.GraphModule) -> None:
    """Rewrite `graph` in place."""
    for root in graph.graph.find_nodes(op="call_function", target=aten.rsqrt.default):
        x, eps = mean_square(root)
        normed = only_user(root)
        if x is None or normed is None or not is_product(normed, x, root):
            continue
        cast = only_user(normed)
        if cast is not None and cast.target is aten._to_copy.default:
            narrow = x.args[0] if x.target is aten._to_copy.default else None
            if not is_node(narrow) or dtype(narrow) != dtype(cast):
                continue
            x, normed = narrow, cast
        scaled = only_user(normed)
        if scaled is None or scaled.target is not aten.mul.Tensor:
            continue
        weight = scaled.args[1] if scaled.args[0] is normed else scaled.args[0]
        if not is_node(weight) or shape(weight) != shape(x)[-1:]:
            continue
        with graph.graph.inserting_before(scaled):
            if dtype(weight) != dtype(x):
                weight = cast_to(graph.graph, weight, dtype(x))
            norm = computed(graph.graph, aten.rms_norm.default, (x, [shape(x)[-1]], weight, eps))
        if dtype(norm) == dtype(scaled):
            scaled.replace_all_uses_with(norm)


def cast_to(graph: fx.Graph, value: Node, wanted: torch.dtype) -> Node:
    """`value` in another dtype."""
    node = graph.call_function(aten._to_copy.default, (value,), {"dtype": wanted})
    node.meta["val"] = value.meta["val"].to(wanted)
    return node


def mean_square(root: Node) -> tuple[Node | None, float]:
    """`x` and eps, if `root` is `rsqrt(mean(x * x) + eps)` over the last dimension."""
    total = root.args[0]
    if not is_node(total) or total.target is not aten.add.Tensor or len(total.args) != 2:
        return None, 0.0
    mean, eps = total.args
    if not is_node(mean) or not isinstance(eps, float) or mean.target is not aten.mean.dim:
        return None, 0.0
    square, dims, kept = (*mean.args, False)[:3]
    if not kept or list(dims) not in ([-1], [len(shape(square)) - 1]):
        return None, 0.0
    x = square.args[0]
    squares = (
        square.target is aten.square.default
        or (square.target is aten.pow.Tensor_Scalar and square.args[1] == 2)
        or (square.target is aten.mul.Tensor and square.args[1] is x)
    )
    return (x, eps) if squares else (None, 0.0)


def is_product(node: Node, one: Node, other: Node) -> bool:
    return node.target is aten.mul.Tensor and node.args in ((one, other), (other, one))


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def dtype(node: Node) -> Any:
    """Of a node's value."""
    return node.meta["val"].dtype
