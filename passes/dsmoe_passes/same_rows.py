"""Do two nodes hold the same tokens? Views and copies that keep the last dimension, and exact casts, change nothing."""

from __future__ import annotations

import torch
from torch import fx

from dsmoe_passes.region import value

aten = torch.ops.aten
VIEWS = {
    aten.view.default,
    aten.view_as.default,
    aten.reshape.default,
    aten.contiguous.default,
    aten._unsafe_view.default,
    aten.alias.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
    aten.clone.default,
}


def unviewed(node: fx.Node) -> fx.Node:
    """`node` without the views and copies in front of it: the same rows `[..., D]` in the same order."""
    while node.op == "call_function" and node.target in VIEWS:
        source = node.args[0]
        if not isinstance(source, fx.Node) or value(source).shape[-1] != value(node).shape[-1]:
            return node
        node = source
    return node


def holds_rows_of(node: fx.Node, tokens: fx.Node) -> bool:
    """Whether `node` is `tokens`, viewed or cast in any way.

    A cast to a wider dtype is exact. One to a narrower only rounds what is read here: who reads `tokens` instead is
    closer to the exact product.
    """
    wanted = unviewed(tokens)
    while True:
        node = unviewed(node)
        if node is wanted:
            return True
        if node.op != "call_function" or node.target is not aten._to_copy.default:
            return False
        node = node.args[0]  # type: ignore[assignment]
