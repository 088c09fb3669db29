"""Nodes of a graph as the rewrites of this target read and make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

Node = Any  # an fx.Node; torch types its arguments as one of 25 things, and which it is the operator says


def is_node(value: Any) -> bool:
    """Whether an argument is the result of a node, and not a number."""
    return isinstance(value, fx.Node)


def computed(graph: fx.Graph, target: Any, args: tuple[Any, ...]) -> Node:
    """A new node with its value's shape, as the tracer would have given it."""
    node = graph.call_function(target, args)
    values = torch.utils._pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, args)
    node.meta["val"] = target(*values)
    return node


def shape(node: Node) -> tuple[Any, ...]:
    """The sizes of a node's value; symbols where they are free."""
    value = node.meta["val"]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
