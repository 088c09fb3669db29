"""Fold what is computed from parameters alone into new parameters, once, at compile time.

Before                                                       After
  both_2SH = cat([gate_proj_SH, up_proj_SH])                    both_2SH = get_attr gate_proj_packed
  y_TH, i_TK = dsmoe.moe(..., both_2SH, down_HS, None)          y_TH, i_TK = dsmoe.moe(..., both_2SH, down_HS, None)

Only in graphs that hold their parameters (`get_attr`); the parameters that nothing reads any more are dropped, so
that the packed copy replaces them; its `packed_from` says what it was made of. Numbers do not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from dsmoe_passes.result import PassResult, Rewritten, layer_of

aten = torch.ops.aten


def pack_weights(gm: fx.GraphModule) -> PassResult:
    """Join the parameters that `gm` concatenates."""
    rewritten = []
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.cat.default)):
        parts = node.args[0]
        if not all(isinstance(part, fx.Node) and part.op == "get_attr" for part in parts):
            continue
        name = pack(gm, node)
        rewritten.append(Rewritten(layer_of(node), " + ".join(part.target for part in parts), name, node.name))
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    drop_unread(gm)
    return PassResult("pack_weights", tuple(rewritten))


def pack(gm: fx.GraphModule, node: fx.Node) -> str:
    """Replace one `cat` of parameters by a parameter, and return its name."""
    parts: list[fx.Node] = node.args[0]  # type: ignore[assignment]
    dim = node.args[1] if len(node.args) > 1 else 0
    with torch.no_grad():
        packed = torch.cat([_fetch(gm, str(part.target)) for part in parts], dim)  # type: ignore[arg-type]
    path, _, leaf = str(parts[0].target).rpartition(".")
    owner = gm.get_submodule(path)
    name = f"{leaf}_packed"
    parameter: Any = nn.Parameter(packed, requires_grad=False)
    parameter.packed_from = (tuple(str(part.target) for part in parts), dim)
    owner.register_parameter(name, parameter)
    target = f"{path}.{name}" if path else name
    with gm.graph.inserting_before(min(parts)):
        attribute = gm.graph.get_attr(target)
    attribute.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(attribute)
    return target


def drop_unread(gm: fx.GraphModule) -> None:
    """Remove the parameters and buffers that no node of the graph reads."""
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    for name, _ in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
        if name not in read:
            path, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(path), leaf)


def _fetch(gm: fx.GraphModule, target: str) -> torch.Tensor:
    path, _, leaf = target.rpartition(".")
    return getattr(gm.get_submodule(path), leaf)
