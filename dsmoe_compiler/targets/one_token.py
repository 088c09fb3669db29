"""A decode step of one sequence on a GPU: each product is a matrix times a vector, and no kernel has much to do.

Read by cuBLAS, the four projections of an attention layer of deepseek-moe-16b reach 1.5 TB/s of 4.8. Written as sums
they are Inductor's to fuse: queries, keys and values become one kernel, tuned by coordinate descent; and what is done
to each of them afterwards becomes one kernel, too. Measured on an H200: a step in 0.80 of the time.
Attention becomes `dsmoe::attend`, our own kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import dsmoe_runtime.ops  # noqa: F401  registers the operator
from dsmoe_compiler.targets.lower import positional

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
OPTIONS: dict[str, Any] = {
    "coordinate_descent_tuning": True,  # this is also what turns such products into sums
    "combo_kernels": True,  # independent kernels in one launch, ...
    "combo_kernels_pointwise_only": True,  # ... but not the sums, which they make slower
}


def is_one(inputs: tuple[Any, ...]) -> bool:
    """Whether a graph whose first input is the ids `[B, S]` takes one token, on CUDA."""
    return bool(inputs[0].is_cuda and inputs[0].numel() == 1)


def options_for(inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Inductor's options for a graph with these inputs: none unless they are one token, on CUDA."""
    return dict(OPTIONS) if is_one(inputs) else {}


def prepare(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """What Inductor should find in a graph for CUDA, changed in place."""
    if is_one(inputs):
        attend(graph)
    masks_to_float(graph)


def attend(graph: fx.GraphModule) -> int:
    """Attention of one query under a mask of bools becomes `dsmoe::attend`, which reads the slots in sight alone.

    y = scaled_dot_product_attention(q [1, A, 1, D], k [1, A, C, D], v [1, A, C, D], mask)
    ->
    y = dsmoe.attend(q, k, v, mask, scale)

    Returns how many calls changed.
    """
    changed = 0
    for call in graph.graph.find_nodes(op="call_function", target=SDPA):
        q, k, v, mask, dropout, causal, scale, shared_keys = positional(call)
        if not isinstance(mask, fx.Node) or dropout or causal or shared_keys:
            continue
        query, key, value, seen = (one.meta["val"] for one in (q, k, v, mask))
        alike = key.shape == value.shape and query.shape == (1, key.shape[1], 1, key.shape[3])
        if not alike or seen.dtype != torch.bool or seen.numel() != key.shape[2]:
            continue
        call.target, call.kwargs = torch.ops.dsmoe.attend.default, {}
        call.args = (q, k, v, mask, key.shape[3] ** -0.5 if scale is None else scale)
        changed += 1
    graph.recompile()
    return changed


def masks_to_float(graph: fx.GraphModule) -> int:
    """Make masks of attention floats where they are made: each layer would do it for itself. How many calls changed.

    y = scaled_dot_product_attention(q, k, v, mask)
    ->
    added = masked_fill(zeros_like(mask, dtype=q.dtype), logical_not(mask), -inf)
    y = scaled_dot_product_attention(q, k, v, added)
    """
    made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    changed = 0
    for call in graph.graph.find_nodes(op="call_function", target=SDPA):
        mask = positional(call)[3]
        if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
            continue
        dtype = call.args[0].meta["val"].dtype
        if (mask, dtype) not in made:
            with graph.graph.inserting_after(mask):
                left_out = called(graph, aten.logical_not.default, mask)
            with graph.graph.inserting_after(left_out):
                zeros = called(graph, aten.zeros_like.default, mask, dtype=dtype)
            with graph.graph.inserting_after(zeros):
                made[mask, dtype] = called(graph, aten.masked_fill.Scalar, zeros, left_out, float("-inf"))
        call.replace_input_with(mask, made[mask, dtype])
        changed += 1
    graph.recompile()
    return changed


def called(graph: fx.GraphModule, target: Any, first: fx.Node, *rest: Any, **options: Any) -> fx.Node:
    """A new node, with the fake value of its result."""
    node = graph.graph.call_function(target, (first, *rest), options)
    values = fx.node.map_arg((first, *rest), lambda n: n.meta["val"])
    with first.meta["val"].fake_mode:
        node.meta["val"] = target(*values, **options)
    return node
