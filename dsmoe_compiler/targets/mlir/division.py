"""A graph divided into steps: calls of operators that have a function of their own, and what lies between them.

    norm, linear, linear, rotate, write, attention, ...
    ->
    Glue(norm)  Call(linear)  Call(linear)  Glue(rotate)  Call(write)  Call(attention)  ...

Glue is what torch-mlir lowers: all that is known by then and was not wanted before, so that it is lowered together.
Views belong to no step, sizes neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from dsmoe_compiler.targets.mlir.layout import IN_PLACE, is_size, root_of, viewed


@dataclass(frozen=True)
class Glue:
    """Nodes that are lowered together, in the order of the graph; views among them are not listed."""

    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Call:
    """One node with a function of its own."""

    node: fx.Node


Step = Glue | Call


def divide(graph: fx.Graph, has_function: Callable[[fx.Node], bool]) -> list[Step]:
    """The steps of a graph in an order in which they can run."""
    steps: list[Step] = []
    pending: dict[fx.Node, None] = {}

    def flush(wanted: Iterable[fx.Node]) -> None:
        """Run what is waiting, if any of it is wanted."""
        if pending and any(root in pending for node in wanted for root in roots(node)):
            steps.append(Glue(tuple(pending)))
            pending.clear()

    used = reachable(graph)
    for node in graph.nodes:
        if node not in used or node.op in ("placeholder", "get_attr") or is_size(node):
            continue
        if node.op == "output":
            flush(node.all_input_nodes)
        elif has_function(node):
            flush(node.all_input_nodes)
            if node.target in IN_PLACE and reads(pending, root_of(node)):
                steps.append(Glue(tuple(pending)))
                pending.clear()
            steps.append(Call(node))
        elif viewed(node) is None and not is_part(node):
            pending[node] = None
    return steps


def roots(node: fx.Node) -> list[fx.Node]:
    """The node that a value comes from, and for an element of several values the node that gives them all."""
    root = root_of(node)
    return [root, *([root.args[0]] if is_part(root) else [])]  # type: ignore[list-item]


def is_part(node: fx.Node) -> bool:
    """Whether a node picks one of several results, such as the experts of a mixture-of-experts layer."""
    import operator

    return node.op == "call_function" and node.target is operator.getitem and viewed(node) is None


def reads(pending: Iterable[fx.Node], written: fx.Node) -> bool:
    """Whether a step that is still to come wants a value that is about to be written over."""
    return any(root_of(source) is written for node in pending for source in node.all_input_nodes)


def reachable(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the output, or something written in place, depends on."""
    todo = [n for n in graph.nodes if n.op == "output" or n.target in IN_PLACE]
    found: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def writes(node: fx.Node) -> bool:
    """Whether a node writes memory that others read."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target in IN_PLACE
