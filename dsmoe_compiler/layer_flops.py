"""FLOPs of a mixture-of-experts layer in a graph: router, routed and shared experts, and what of them operators do.

A product of `[n, k]` and `[k, m]` is 2 n k m. Sizes are those that were traced; where one depends on data, the
layer has no count.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from dsmoe_compiler.capture import EXPERTS_OP, MOE_OP
from dsmoe_passes.result import layer_of

aten = torch.ops.aten
GATE_UP, SHARED = 13, 21  # operands of dsmoe::moe: gate_up, down; shared_gate_up, shared_down
LINEAR = {aten.linear.default}
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.matmul.default, aten._grouped_mm.default}
FALLBACK = "transformers.grouped_mm_fallback"


def layer_flops(graph: fx.GraphModule, block: str, node: fx.Node | None = None) -> tuple[int | None, int | None]:
    """All FLOPs of the layer that the module `block` is, and those of its operator `node` (None: it has none)."""
    try:
        fused = 0 if node is None else operator_flops(node)
        beside = [
            gemm_flops(other) for other in graph.graph.nodes if other is not node and _belongs(other, block, node)
        ]
    except TypeError:  # a size that depends on data
        return None, None
    return fused + sum(beside), fused


def operator_flops(node: fx.Node) -> int:
    """FLOPs of a `dsmoe::moe` or `dsmoe::experts`."""
    tokens, hidden = _sizes(node.args[0])
    if node.target is EXPERTS_OP:
        return 2 * prod(_sizes(node.args[1])) * sum(prod(_sizes(weight)[1:]) for weight in node.args[3:5])
    slots = tokens * int(node.args[4])  # type: ignore[arg-type]
    routed = slots * sum(prod(_sizes(weight)[1:]) for weight in node.args[GATE_UP : GATE_UP + 2])
    shared = sum(prod(_sizes(weight)) for weight in node.args[SHARED : SHARED + 2] if weight is not None)
    return 2 * (routed + tokens * (_sizes(node.args[1])[0] * hidden + shared))


def gemm_flops(node: fx.Node) -> int:
    """FLOPs of a product of matrices: its result's size times the length of the sums."""
    return 2 * prod(_sizes(node)) * _sizes(node.args[0])[-1]


def _belongs(node: fx.Node, block: str, found: fx.Node | None) -> bool:
    """Whether `node` is a product inside `block`; of a block that is a whole decoder layer only the router counts."""
    if node.target not in LINEAR | PRODUCTS and not str(node.target).startswith(FALLBACK):
        return False
    path = layer_of(node)
    if not (path == block or path.startswith(f"{block}.") or not block):
        return False
    if block.rpartition(".")[2].isdigit() and found is not None:
        at = GATE_UP if found.target is MOE_OP else 3
        return node.target in LINEAR and _sizes(node)[-1] == _sizes(found.args[at])[0]
    return True


def _sizes(node: Any) -> list[int]:
    """The sizes of a node's value as traced. Raises: TypeError for one that depends on data."""
    return [int(s if isinstance(s, int) else s.node.hint) for s in node.meta["val"].shape]
