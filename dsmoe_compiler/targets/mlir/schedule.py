"""A graph divided, laid out in memory, and written as a program.

Each value that is not a view has memory: an argument's, that of a result, or a place in the workspace from the step
that makes it to the last that reads it. Steps run one after the other; each is parallel in itself.
"""

from __future__ import annotations

import time
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from dsmoe_compiler.targets.mlir.arena import Arena
from dsmoe_compiler.targets.mlir.calls import Calls, kind_of
from dsmoe_compiler.targets.mlir.division import Call, Glue, Step, divide, is_part
from dsmoe_compiler.targets.mlir.glue import glue_graph
from dsmoe_compiler.targets.mlir.layout import (
    IN_PLACE,
    Buffer,
    View,
    buffer_of,
    is_size,
    root_of,
    tensor_of,
    view_of,
)
from dsmoe_compiler.targets.mlir.operators import Operation, operation
from dsmoe_compiler.targets.mlir.plan import Output, Schedule
from dsmoe_compiler.targets.mlir.prepare import prepared
from dsmoe_compiler.targets.mlir.sizes import size_of
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.levels import Level


def schedule(graph: fx.GraphModule, name: str, level: Level) -> Schedule:
    """Divide a graph, lay out its values, and write its program."""
    start = time.perf_counter()
    result = _Scheduler(prepared(graph), name, level).run()
    result.seconds = time.perf_counter() - start
    return result


class _Scheduler:
    def __init__(self, graph: fx.GraphModule, name: str, level: Level) -> None:
        self.graph, self.level = graph.graph, level
        self.owner = graph
        self.buffers: dict[fx.Node, Buffer] = {}
        self.arena = Arena()
        self.number: dict[Buffer, int] = {}  # of an argument
        self.keys: dict[str, str] = {}
        self.result = Schedule(name, [], [], {}, [])

    # Where values lie ----------------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Tensor:
        value: Any = tensor_of(node)
        if value is None and node.op == "get_attr":
            value = reduce(getattr, str(node.target).split("."), self.owner)
        if not isinstance(value, Tensor):
            raise TargetError(f"{node.name} ({node.target}) is no tensor: mlir-cpu cannot hand it from step to step")
        return value

    def buffer(self, node: fx.Node) -> Buffer:
        if node not in self.buffers:
            self.buffers[node] = buffer_of(self.value(node), node.name)
        return self.buffers[node]

    def where(self, node: fx.Node) -> View:
        root = root_of(node)
        return view_of(self.value(node), self.buffer(root), self.value(root))

    # Steps ---------------------------------------------------------------------------------------------------------

    def run(self) -> Schedule:
        result = self.result
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.placeholder(node)
            elif node.op == "get_attr" and isinstance(self.value(node), Tensor):
                self.argument("weight", str(node.target), self.buffer(node))
        operations: dict[fx.Node, Operation] = {}

        def has_function(node: fx.Node) -> bool:
            found = operation(node, self.where, self.level)
            if found is not None:
                operations[node] = found
            return found is not None

        steps = divide(self.graph, has_function)
        made = [self.made(step, operations) for step in steps]
        owner = {node: number for number, nodes in enumerate(made) for node in nodes}
        uses = [self.uses(step) for step in steps]
        output = self.graph.output_node()
        results: Any = output.args[0]
        results = results if isinstance(results, list | tuple) else (results,)
        for node in results:
            self.output(node, owner)
        last: dict[fx.Node, int] = {}
        for number, nodes in enumerate(uses):
            for node in nodes:
                last[node] = number
        calls = Calls(result.name, list(result.sources), self.number, self.arena)
        for number, step in enumerate(steps):
            self.write(calls, step, made[number], operations)
            gone = {node for node in {*uses[number], *made[number]} if last.get(node, number) == number}
            self.forget(gone & owner.keys())
        result.text = calls.text()
        return result

    def placeholder(self, node: fx.Node) -> None:
        number = len(self.result.inputs)
        self.result.inputs.append(node.name)
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            self.argument("input", node.name, self.buffer(node))
            for dim, size in enumerate(value.shape):
                self.source(size, number, dim)
        elif isinstance(value, torch.SymInt):
            self.source(value, number, None)

    def source(self, size: Any, number: int, dim: int | None) -> None:
        expression = size_of(size)
        if not isinstance(expression, int) and expression.is_Symbol:
            self.result.sources.setdefault(str(expression), (number, dim))

    def argument(self, kind: str, name: str, buffer: Buffer) -> None:
        self.number[buffer] = len(self.result.arguments)
        self.result.arguments.append((kind, name, buffer))

    def output(self, node: Any, owner: dict[fx.Node, int]) -> None:
        if node is None or not isinstance(node, fx.Node) or is_size(node):
            if isinstance(node, fx.Node):
                raise TargetError(f"the graph returns the size {node.name}: mlir-cpu returns tensors")
            self.result.outputs.append(None)
            return
        buffer = self.buffer(root_of(node))
        if buffer not in self.number:
            self.argument("output", node.name, buffer)
        self.result.outputs.append(Output(self.number[buffer], self.where(node), self.value(node).dtype))

    def made(self, step: Step, operations: dict[fx.Node, Operation]) -> tuple[fx.Node, ...]:
        """The values that a step makes and others read."""
        if isinstance(step, Call):
            return operations[step.node].made
        inside = set(step.nodes)
        candidates = [*step.nodes, *(u for n in step.nodes for u in n.users if is_part(u))]
        wanted = []
        for node in candidates:
            if tensor_of(node) is not None and any(self.outside(user, inside) for user in node.users):
                wanted.append(node)
        return tuple(wanted)

    def outside(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        """Whether a node, or what reads it where it is a view, belongs to another step."""
        if node in inside:
            return False
        if node.op == "call_function" and node.target not in IN_PLACE and root_of(node) is not node:
            return any(self.outside(user, inside) for user in node.users)
        return not is_size(node)

    def uses(self, step: Step) -> set[fx.Node]:
        nodes = step.nodes if isinstance(step, Glue) else (step.node,)
        found = {root_of(source) for node in nodes for source in node.all_input_nodes if not is_size(source)}
        return found - set(nodes)

    # Text ----------------------------------------------------------------------------------------------------------

    def write(self, calls: Calls, step: Step, made: tuple[fx.Node, ...], operations: dict[fx.Node, Operation]) -> None:
        for node in made:
            if self.buffer(node) not in self.number:
                self.arena.take(self.buffer(node))
        if isinstance(step, Glue):
            return self.glue(calls, step, made)
        found = operations[step.node]
        self.result.functions[found.function.name] = found.function
        self.note(step.node, found.function.name)
        return calls.add(list(zip(found.operands, found.function.arguments, strict=True)), found.function.call)

    def glue(self, calls: Calls, step: Glue, made: tuple[fx.Node, ...]) -> None:
        graph = glue_graph(step, made, self.buffer)
        if graph.key not in self.keys:
            self.keys[graph.key] = f"glue_{len(self.keys)}"
            self.result.glues[self.keys[graph.key]] = graph
        name = self.keys[graph.key]
        for node in step.nodes:
            self.note(node, name)
        given, taken = ([self.buffer(node) for node in nodes] for nodes in (graph.inputs, graph.outputs))
        kinds = [*map(kind_of, given), *["i64"] * len(graph.sizes), *map(kind_of, taken)]
        calls.add(
            [*given, *graph.sizes, *taken],
            lambda values: f"func.call @{name}({', '.join(values)}) : ({', '.join(kinds)}) -> ()",
        )

    def note(self, node: fx.Node, name: str) -> None:
        """That the modules around a node call a function."""
        for path, *_ in (node.meta.get("nn_module_stack") or {}).values():
            self.result.layers.setdefault(path, set()).add(name)

    def forget(self, nodes: set[fx.Node]) -> None:
        """Nobody reads these values any more: others may have their places."""
        buffers = sorted((self.buffer(node) for node in nodes), key=lambda buffer: buffer.name)
        self.arena.give_back(buffer for buffer in buffers if buffer in self.arena.place)
