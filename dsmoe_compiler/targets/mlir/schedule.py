"""The program of a graph: one function that calls its steps in turn, on memory that the caller owns.

    llvm.func @prefill(%data: !llvm.ptr, %sizes: !llvm.ptr)
      call @glue_0(embedding, ids, ...)        torch-mlir's loops, each distinct one once
      call @linear_..(x, weight, y)            functions of the waist, each distinct one once
      ...

`data` points to the addresses of all arguments and, last, of a workspace; `sizes` to the values of the free dimensions.
`@prefill_workspace(sizes)` says how many bytes the workspace takes.
"""

from __future__ import annotations

import time
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from dsmoe_compiler.targets.mlir.arena import LINE, Arena
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
from dsmoe_compiler.targets.mlir.sizes import SizeCode, size_of
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.levels import Level

BASE = "memref<?xi8>"
STRUCT = "!llvm.struct<(ptr, ptr, i64, array<1 x i64>, array<1 x i64>)>"
# The address number %i of the caller's, as memory without a known end.
MEMORY = f"""\
  func.func private @memory(%data: !llvm.ptr, %i: i64) -> {BASE} {{
    %place = llvm.getelementptr %data[%i] : (!llvm.ptr, i64) -> !llvm.ptr, !llvm.ptr
    %address = llvm.load %place : !llvm.ptr -> !llvm.ptr
    %none = llvm.mlir.undef : {STRUCT}
    %zero = llvm.mlir.constant(0 : i64) : i64
    %one = llvm.mlir.constant(1 : i64) : i64
    %many = llvm.mlir.constant(4611686018427387904 : i64) : i64
    %a = llvm.insertvalue %address, %none[0] : {STRUCT}
    %b = llvm.insertvalue %address, %a[1] : {STRUCT}
    %c = llvm.insertvalue %zero, %b[2] : {STRUCT}
    %d = llvm.insertvalue %many, %c[3, 0] : {STRUCT}
    %e = llvm.insertvalue %one, %d[4, 0] : {STRUCT}
    %whole = builtin.unrealized_conversion_cast %e : {STRUCT} to {BASE}
    return %whole : {BASE}
  }}"""


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
        self.code, self.arena = Code(), Arena()
        self.number: dict[Buffer, int] = {}  # of an argument
        self.bases: dict[Any, str] = {}
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
        body = self.code
        with body.region(f"llvm.func @{result.name}(%data: !llvm.ptr, %sizes: !llvm.ptr)"):
            self.size = SizeCode(body, self.free())
            begin = len(body.lines)
            for number, step in enumerate(steps):
                self.write(step, made[number], operations)
                gone = {node for node in {*uses[number], *made[number]} if last.get(node, number) == number}
                self.forget(gone & owner.keys())
            body.line("llvm.return")
        self.insert_places(begin)
        self.workspace()
        result.text = f"{MEMORY}\n{body.text()}"
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

    def free(self) -> dict[str, str]:
        names = {}
        for number, symbol in enumerate(self.result.sources):
            place = self.code.let(f"llvm.getelementptr %sizes[{number}] : (!llvm.ptr) -> !llvm.ptr, i64")
            value = self.code.let(f"llvm.load {place} : !llvm.ptr -> i64")
            names[symbol] = self.code.let(f"arith.index_cast {value} : i64 to index", "s")
        return names

    def write(self, step: Step, made: tuple[fx.Node, ...], operations: dict[fx.Node, Operation]) -> None:
        for node in made:
            if self.buffer(node) not in self.number:
                self.arena.take(self.buffer(node))
        if isinstance(step, Call):
            self.call(operations[step.node], step.node)
        else:
            self.glue(step, made)

    def forget(self, nodes: set[fx.Node]) -> None:
        buffers = sorted((self.buffer(node) for node in nodes), key=lambda buffer: buffer.name)
        self.arena.give_back(buffer for buffer in buffers if buffer in self.arena.place)

    def call(self, found: Operation, node: fx.Node) -> None:
        self.result.functions[found.function.name] = found.function
        self.note(node, found.function.name)
        values = [self.strided(view, kind) for view, kind in zip(found.operands, found.function.arguments, strict=True)]
        self.code.line(found.function.call(values))

    def glue(self, step: Glue, made: tuple[fx.Node, ...]) -> None:
        graph = glue_graph(step, made, self.buffer)
        if graph.key not in self.keys:
            self.keys[graph.key] = f"glue_{len(self.keys)}"
            self.result.glues[self.keys[graph.key]] = graph
        name = self.keys[graph.key]
        for node in step.nodes:
            self.note(node, name)
        buffers = [self.buffer(node) for node in (*graph.inputs, *graph.outputs)]
        values, kinds = [self.whole(buffer) for buffer in buffers], [kind_of(buffer) for buffer in buffers]
        sizes = [self.code.let(f"arith.index_cast {self.size(size)} : index to i64") for size in graph.sizes]
        at = len(graph.inputs)
        values[at:at], kinds[at:at] = sizes, ["i64"] * len(sizes)
        self.code.line(f"func.call @{name}({', '.join(values)}) : ({', '.join(kinds)}) -> ()")

    def note(self, node: fx.Node, name: str) -> None:
        for path, *_ in (node.meta.get("nn_module_stack") or {}).values():
            self.result.layers.setdefault(path, set()).add(name)

    def base(self, buffer: Buffer) -> tuple[str, str]:
        """The bytes that hold a buffer, and where in them it begins."""
        if buffer in self.number:
            if buffer not in self.bases:
                place = self.code.let(f"llvm.mlir.constant({self.number[buffer]} : i64) : i64", "k")
                self.bases[buffer] = self.code.let(f"func.call @memory(%data, {place}) : (!llvm.ptr, i64) -> {BASE}")
            return self.bases[buffer], self.size(0)
        return "%workspace", f"%place{self.arena.place[buffer]}"

    def whole(self, buffer: Buffer) -> str:
        base, start = self.base(buffer)
        free = ", ".join(self.size(size) for size in buffer.sizes if not isinstance(size, int))
        return self.code.let(f"memref.view {base}[{start}][{free}] : {BASE} to {kind_of(buffer)}")

    def strided(self, view: View, kind: str) -> str:
        base, start = self.base(view.buffer)
        flat = f"memref<?x{view.element}>"
        count = self.size(view.buffer.count)
        values = self.code.let(f"memref.view {base}[{start}][{count}] : {BASE} to {flat}")
        sizes = ", ".join(self.size(size) for size in view.sizes)
        strides = [self.size(stride) for stride in view.strides]
        if "1]" in kind:
            strides[-1] = "1"
        return self.code.let(
            f"memref.reinterpret_cast {values} to offset: [{self.size(view.offset)}], sizes: [{sizes}], "
            f"strides: [{', '.join(strides)}] : {flat} to {kind}"
        )

    def insert_places(self, begin: int) -> None:
        """Before the first step: the workspace, and where its places begin."""
        steps, self.code.lines = self.code.lines, []
        size = SizeCode(self.code, self.size.free)
        number = self.code.let(f"llvm.mlir.constant({len(self.result.arguments)} : i64) : i64", "k")
        self.code.line(f"  %workspace = func.call @memory(%data, {number}) : (!llvm.ptr, i64) -> {BASE}")
        for place, start in enumerate(self.offsets(size)[:-1]):
            self.code.line(f"  %place{place} = arith.addi {start}, {size(0)} : index")
        self.code.lines = [*steps[:begin], *self.code.lines, *steps[begin:]]

    def offsets(self, size: SizeCode) -> list[str]:
        """Where each place begins, and the end."""
        starts = [size(0)]
        for bytes_ in self.arena.sizes:
            lines = self.code.div(self.code.add(size(bytes_), LINE - 1), LINE)
            starts.append(self.code.add(starts[-1], self.code.mul(lines, LINE)))
        return starts

    def workspace(self) -> None:
        with self.code.region(f"llvm.func @{self.result.name}_workspace(%sizes: !llvm.ptr) -> i64"):
            end = self.offsets(SizeCode(self.code, self.free()))[-1]
            self.code.line(f"llvm.return {self.code.let(f'arith.index_cast {end} : index to i64')} : i64")


def kind_of(buffer: Buffer) -> str:
    """The memref type of a whole buffer, free dimensions as `?`."""
    sizes = "".join(f"{size if isinstance(size, int) else '?'}x" for size in buffer.sizes)
    return f"memref<{sizes}{buffer.element}>"
