"""A decode step of one sequence on a GPU: each product is a matrix times a vector, and no kernel has much to do.

Read by cuBLAS, the four projections of an attention layer of deepseek-moe-16b reach 1.5 TB/s of 4.8 on an H200; written
as sums and tuned by Inductor 1.5 to 2.6, as the tuning goes. So they become `dsmoe::gemv`, queries, keys and values in
one launch (3.7 in a chain of such products), and attention becomes `dsmoe::attend`.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

import dsmoe_runtime.ops  # noqa: F401  registers the operators
from dsmoe_compiler.targets.lower import positional, values
from dsmoe_runtime.ops.cuda import DTYPES
from dsmoe_runtime.ops.gemv import MOST

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
OPTIONS: dict[str, Any] = {
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
        products(graph)
        attend(graph)
    masks_to_float(graph)


def products(graph: fx.GraphModule) -> int:
    """Products of one row with weights become `dsmoe::gemv`, those that read the same row three at a time.

    q, k = linear(x, w_q), linear(x, w_k, bias)
    ->
    q, k_ = split(dsmoe.gemv(x, [w_q, w_k]), [N_q, N_k], -1)
    k = k_ + bias

    Returns how many products changed.
    """
    groups: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = defaultdict(list)
    for node in graph.graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight, _ = values(node)
        one_row = x.numel() == x.shape[-1] and x.dtype in DTYPES
        if one_row and node.args[1].op == "get_attr" and weight.is_contiguous():
            groups[node.args[0], weight.dtype].append(node)
    for (x, _), alike in groups.items():
        for at in range(0, len(alike), MOST):
            join(graph.graph, x, alike[at : at + MOST])
    graph.recompile()
    return sum(map(len, groups.values()))


def join(graph: fx.Graph, x: fx.Node, alike: list[fx.Node]) -> None:
    """One call of `dsmoe::gemv` in the place of the first of `alike`, products of `x`."""
    first, weights, row = alike[0], [node.args[1] for node in alike], x.meta["val"]
    sizes = [node.meta["val"].shape[-1] for node in alike]
    for weight in weights:
        first.prepend(weight)  # type: ignore[arg-type]
    with graph.inserting_before(first):
        whole = graph.call_function(torch.ops.dsmoe.gemv.default, (x, weights))
        whole.meta["val"] = row.new_empty((*row.shape[:-1], sum(sizes)))
        parts = called(graph, aten.split_with_sizes.default, whole, sizes, -1)
    for at, node in enumerate(alike):
        with graph.inserting_before(node):
            product = graph.call_function(operator.getitem, (parts, at))
            product.meta["val"] = parts.meta["val"][at]
            bias = positional(node)[2]
            if bias is not None:
                product = graph.call_function(aten.add.Tensor, (product, bias))
                product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)


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
                left_out = called(graph.graph, aten.logical_not.default, mask)
            with graph.graph.inserting_after(left_out):
                zeros = called(graph.graph, aten.zeros_like.default, mask, dtype=dtype)
            with graph.graph.inserting_after(zeros):
                made[mask, dtype] = called(graph.graph, aten.masked_fill.Scalar, zeros, left_out, float("-inf"))
        call.replace_input_with(mask, made[mask, dtype])
        changed += 1
    graph.recompile()
    return changed


def called(graph: fx.Graph, target: Any, first: fx.Node, *rest: Any, **options: Any) -> fx.Node:
    """A new node, with the fake value of its result."""
    node = graph.call_function(target, (first, *rest), options)
    values = fx.node.map_arg((first, *rest), lambda n: n.meta["val"])
    with first.meta["val"].fake_mode:
        node.meta["val"] = target(*values, **options)
    return node
