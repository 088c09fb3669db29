"""Heads that share keys and values: attention reads them once, instead of a copy for every query head.

    sdpa(q, repeat(k), repeat(v), mask)   ->   sdpa(q, k, v, mask, enable_gqa=True)

B sequences, S positions, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from dsmoe_compiler.targets.onnx.nodes import Node, shape

aten = torch.ops.aten
PASSED = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default, aten.expand.default,
)  # fmt: skip


def share_heads(graph: fx.GraphModule) -> None:
    """Rewrite every attention whose keys and values are repeated in the graph, in place."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        key, value = (repeated(n) for n in node.args[1:3])
        if key is None or value is None or shape(key)[1] != shape(value)[1]:
            continue
        if shape(node.args[0])[1] % shape(key)[1] or shape(node.args[0])[1] == shape(key)[1]:
            continue
        node.args = (node.args[0], key, value, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}


def repeated(node: Node) -> Node | None:
    """`x [B, heads, S, D]`, if `node` is it with every head repeated in place."""
    if node.target is aten.repeat_interleave.self_int and len(node.args) == 3 and node.args[2] == 1:
        return node.args[0]
    chain = list(back(node, PASSED))
    expanded = next((n for n in chain if n.target is aten.expand.default), None)
    if expanded is None or expanded.args[0].target is not aten.unsqueeze.default:
        return None
    lifted = expanded.args[0]
    x, dim = lifted.args
    if dim != 2 or len(shape(x)) != 4 or len(shape(node)) != 4:
        return None
    kept = [size for at, size in enumerate(shape(expanded)) if at != 2]
    same = all(str(a) == str(b) for a, b in zip(kept, shape(x), strict=True))
    return x if same and shape(node)[1] == shape(x)[1] * shape(expanded)[2] else None


def back(node: Node, through: tuple[Callable[..., Any], ...]) -> Iterator[Node]:
    """`node` and what it is made of, as long as that is one of these operators."""
    while node.op == "call_function" and node.target in through:
        yield node
        node = node.args[0]
