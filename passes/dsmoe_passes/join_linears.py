"""Products of one input with three or more weights become one product with the weights joined.

Before                                       After
  q = linear(x, w_q)                           joint = linear(x, cat([w_q, w_k, w_v]))
  k = linear(x, w_k)                           q, k, v = split(joint, [N_q, N_k, N_v], -1)
  v = linear(x, w_v)

`pack_weights` then makes one parameter of the `cat`. A weight that is read elsewhere stays apart, and so does a product
with a bias. Each number is a sum over the same values as before. For targets that read a weight in one kernel each:
Inductor joins such products of one token by itself.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import fx

from dsmoe_passes.region import call, item
from dsmoe_passes.result import PassResult, Rewritten, layer_of

aten = torch.ops.aten
LEAST = 3  # queries, keys, values; to take the two halves of an MLP apart again costs more than it saves


def join_linears(gm: fx.GraphModule) -> PassResult:
    """Join the linears of `gm` that read the same value."""
    groups: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight, *bias = node.args
        alone = weight.op == "get_attr" and len(weight.users) == 1
        if alone and not any(bias) and not node.kwargs:
            groups[x, weight.meta["val"].dtype].append(node)
    rewritten = []
    for (x, _), nodes in groups.items():
        if len(nodes) >= LEAST:
            rewritten.append(Rewritten(layer_of(nodes[0]), f"{len(nodes)} products", "linear", nodes[0].name))
            join(gm.graph, x, nodes)
    gm.graph.eliminate_dead_code()
    return PassResult("join_linears", tuple(rewritten))


def join(graph: fx.Graph, x: fx.Node, nodes: list[fx.Node]) -> None:
    """One linear in the place of the first of `nodes`; the weights are taken there."""
    first, weights = nodes[0], [node.args[1] for node in nodes]
    for weight in weights:
        first.prepend(weight)  # type: ignore[arg-type]
    joined = call(graph, aten.cat.default, (weights,), before=first, like=first)
    sizes = [node.meta["val"].shape[-1] for node in nodes]
    with graph.inserting_before(first):
        product = graph.call_function(aten.linear.default, (x, joined))
    whole = first.meta["val"]
    product.meta = {**first.meta, "val": whole.new_empty((*whole.shape[:-1], sum(sizes)))}
    parts = call(graph, aten.split_with_sizes.default, (product, sizes, -1), before=first, like=first)
    for at, node in enumerate(nodes):
        node.replace_all_uses_with(item(graph, parts, at, before=first))
