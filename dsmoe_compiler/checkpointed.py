"""Graphs with activation checkpointing: every region that is computed again in the backward is fused by itself.

Before                                                       After
  y = tag_activation_checkpoint(body_0, x, w, ...)              y = tag_activation_checkpoint(body_0, x, w, ...)
  body_0: linear, softmax, topk, ..., _grouped_mm, ...          body_0: ..., dsmoe.moe, ...

torch cannot write such a graph as one functional graph above autograd, but it can write each region so. What lies
between the regions stays as Dynamo wrote it. transformers checkpoints whole decoder layers, so that every
mixture-of-experts layer lies in a region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def regions(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of checkpointed regions in Dynamo's graph."""
    return list(gm.graph.find_nodes(op="call_function", target=CHECKPOINT))


def replace_regions(
    gm: fx.GraphModule, rewrite: Callable[[fx.GraphModule, Sequence[Any]], fx.GraphModule]
) -> fx.GraphModule:
    """Put `rewrite(body, its inputs)` in the place of each region's body, in `gm` itself."""
    for node in regions(gm):
        body, *arguments = node.args
        assert isinstance(body, fx.Node)
        name = str(body.target)
        inputs = [a.meta["example_value"] if isinstance(a, fx.Node) else a for a in arguments]
        setattr(gm, name, rewrite(getattr(gm, name), inputs))
    gm.recompile()
    return gm
