"""Weights by what they are made of, so that another model's values can stand in their place.

    "model.layers.1.mlp.router.weight"                ["layers.1.mlp.router.weight"], null
    "...shared_experts.gate_proj.weight_packed"       ["...gate_proj.weight", "...up_proj.weight"], 0     joined along 0

A graph whose tensors are not all made so (a constant of the trace, say) has no recipe and is not cached.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsmoe_compiler.compiled.fingerprint import Unusual

PREFIX = "model."  # where the phases hold the model
Recipe = list[Any]  # names of the model's tensors, and the dimension that they are joined along (None: one alone)
LITERALS = (int, float, str, bool, type(None))


def recipe(graph: fx.GraphModule, target: str, model: nn.Module) -> Recipe:
    """What the tensor `target` of a graph is made of. Raises: Unusual, if that cannot be told."""
    tensor = fetch(graph, target)
    parts, dim = getattr(tensor, "packed_from", ((target,), None))
    made: Recipe = [[part.removeprefix(PREFIX) for part in parts], dim]
    try:
        again = build(made, model)
    except AttributeError:
        raise Unusual(f"the graph holds {target}, which is no tensor of the model") from None
    alike = again.dtype == tensor.dtype and again.shape == tensor.shape and again.stride() == tensor.stride()
    if not alike or (again.data_ptr() != tensor.data_ptr() and not torch.equal(again, tensor)):
        raise Unusual(f"the graph holds {target}, which is not the model's own")
    return made


def build(made: Recipe, model: nn.Module) -> Tensor:
    """A weight of `model` by its recipe."""
    names, dim = made
    parts = [fetch(model, name) for name in names]
    with torch.no_grad():
        return parts[0] if dim is None else torch.cat(parts, dim)


def fetch(owner: nn.Module, name: str) -> Any:
    """An attribute by its dotted name."""
    return reduce(getattr, name.split("."), owner)


def operands(graph: fx.GraphModule, node: fx.Node, model: nn.Module) -> list[dict[str, Any]]:
    """The arguments of an operator but the first, as plain data. Raises: Unusual."""
    found: list[dict[str, Any]] = []
    for operand in node.args[1:]:
        if isinstance(operand, fx.Node) and operand.op == "get_attr":
            found.append({"recipe": recipe(graph, str(operand.target), model)})
        elif isinstance(operand, LITERALS):
            found.append({"value": operand})
        else:
            raise Unusual(f"{node.name} takes {operand}, which is computed in the graph")
    return found


def operand_values(found: list[dict[str, Any]], model: nn.Module) -> list[Any]:
    """The inverse of `operands`, with the weights of `model`."""
    return [build(one["recipe"], model) if "recipe" in one else one["value"] for one in found]
