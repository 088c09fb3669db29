"""What lies between two calls, as a graph of its own: dense inputs in the order of memory, dense outputs likewise.

    rotate(transpose(unflatten(linear)))     linear is made elsewhere: an input

Views of an input come along, and are lowered with what reads them.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from dsmoe_compiler.targets.mlir.division import Glue, is_part
from dsmoe_compiler.targets.mlir.layout import ELEMENTS, IN_PLACE, Buffer, is_size, shape_of, tensor_of, viewed
from dsmoe_compiler.targets.mlir.sizes import Size, size_of
from dsmoe_runtime.errors import TargetError

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
# torch sums half precision in float32 and rounds once; linalg would round at every step.
WIDENED = (
    aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default, aten.softmax.int, aten._softmax.default,
    aten.var.dim, aten.cumsum.default, aten.layer_norm.default, aten.rms_norm.default, aten.log_softmax.int,
)  # fmt: skip


@dataclass(frozen=True)
class GlueGraph:
    """A graph without parameters. `inputs` are nodes of the whole graph, `sizes` come after them."""

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    sizes: tuple[Size, ...]
    outputs: tuple[fx.Node, ...]
    key: str  # equal for graphs that differ in names only


def glue_graph(glue: Glue, outputs: Iterable[fx.Node], buffer: Callable[[fx.Node], Buffer]) -> GlueGraph:
    """The step as a graph; `outputs` are the values that others want, `buffer` says how a value lies in memory."""
    builder = _Builder(set(glue.nodes), buffer)
    for node in glue.nodes:
        builder.value(node)
    wanted = tuple(outputs)
    results = [builder.in_memory_order(builder.value(node), node) for node in wanted]
    builder.new("output", "output", (tuple(results),), None)
    inputs = tuple(builder.inputs)
    # Placeholders first, tensors before sizes.
    graph, first = builder.graph, next(iter(builder.graph.nodes), None)
    for place in [*builder.inputs.values(), *builder.sizes.values()]:
        if first is not place:
            assert first is not None
            first.prepend(place)
        else:
            first = first.next
    return GlueGraph(graph, inputs, tuple(builder.sizes), wanted, _key(graph))


class _Builder:
    def __init__(self, nodes: set[fx.Node], buffer: Callable[[fx.Node], Buffer]) -> None:
        self.nodes, self.buffer = nodes, buffer
        self.graph = fx.Graph()
        self.made: dict[fx.Node, Any] = {}
        self.inputs: dict[fx.Node, fx.Node] = {}
        self.sizes: dict[Size, fx.Node] = {}

    def new(self, op: str, target: Any, arguments: tuple[Any, ...], value: Any, options: Any = None) -> fx.Node:
        name = f"v{len(self.graph.nodes)}"
        node = self.graph.create_node(op, name if op == "placeholder" else target, arguments, options or {}, name)
        if value is not None:
            node.meta["val"] = value
        return node

    def value(self, node: fx.Node) -> Any:
        """The node that stands for one of the whole graph."""
        if node not in self.made:
            self.made[node] = self.make(node)
        return self.made[node]

    def make(self, node: fx.Node) -> Any:
        if is_size(node):
            return self.size(node.meta["val"])
        if node.target in IN_PLACE:
            return self.value(node.args[0])  # type: ignore[arg-type]
        if node in self.nodes or viewed(node) is not None or (is_part(node) and node.args[0] in self.nodes):
            arguments, options = map_arg((node.args, node.kwargs), self.value)
            return self.called(node, arguments, dict(options))
        value = self.tensor(node)
        order = self.buffer(node).order
        plain = order == tuple(range(len(order)))
        place = self.inputs[node] = self.new("placeholder", "", (), value if plain else value.permute(order))
        if plain:
            return place
        back = [order.index(dim) for dim in range(len(order))]
        return self.new("call_function", aten.permute.default, (place, back), value)

    def size(self, value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        size = size_of(value)
        if isinstance(size, int):
            return size
        if size not in self.sizes:
            self.sizes[size] = self.new("placeholder", "", (), value)
        return self.sizes[size]

    def tensor(self, node: fx.Node) -> Tensor:
        value = tensor_of(node)
        if value is None:
            raise TargetError(f"{node.name} ({node.target}) is no tensor: mlir-cpu cannot hand it from step to step")
        return value

    def called(self, node: fx.Node, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        value = node.meta.get("val")
        empty = next((source for source in node.all_input_nodes if is_empty(source)), None)
        if empty is not None:  # torch-mlir divides by its size, and the process ends
            raise TargetError(f"{node.name} ({node.target}) reads {empty.name}, which is empty: mlir-cpu has no such")
        options = {name: v for name, v in options.items() if name not in ("pin_memory", "layout")}
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        half = first is not None and tensor_of(first) is not None and tensor_of(first).dtype in HALF  # type: ignore[union-attr]
        if node.target in WIDENED and half and isinstance(value, Tensor):
            assert first is not None
            wide = {"dtype": torch.float32}
            sources = [
                self.new("call_function", aten._to_copy.default, (a,), a.meta["val"].to(torch.float32), wide)
                if isinstance(a, fx.Node) and isinstance(a.meta["val"], Tensor) else a
                for a in arguments
            ]  # fmt: skip
            made = self.new("call_function", node.target, tuple(sources), value.to(torch.float32), options)
            return self.new("call_function", aten._to_copy.default, (made,), value, {"dtype": value.dtype})
        if node.target is aten.scaled_dot_product_attention.default:
            return self.attention(*positional(node, arguments, options))
        if node.target is operator.getitem and isinstance(arguments[0], list | tuple):
            return arguments[0][arguments[1]]
        return self.new(node.op, node.target, arguments, value, options)

    def run(self, target: Any, *arguments: Any) -> fx.Node:
        """A new call, whose fake value is computed."""
        value = target(*map_arg(arguments, lambda node: node.meta["val"]))
        return self.new("call_function", target, arguments, value)

    def attention(self, q: fx.Node, k: fx.Node, v: fx.Node, mask: Any, dropout: float, causal: bool, scale: Any,
                  gqa: bool) -> fx.Node:  # fmt: skip
        """Attention as products and a softmax, for what the waist's function does not take."""
        if dropout:
            raise TargetError(f"attention with dropout {dropout} is for training; mlir-cpu runs inference only")
        value = q.meta["val"]
        q, k, v = (self.run(aten._to_copy.default, t) if t.meta["val"].dtype == torch.float32 else self.wide(t)
                   for t in (q, k, v))  # fmt: skip
        if gqa:
            groups = value.shape[-3] // k.meta["val"].shape[-3]
            k, v = (self.run(aten.repeat_interleave.self_int, t, groups, -3) for t in (k, v))
        factor = scale if scale is not None else 1.0 / math.sqrt(value.shape[-1])
        scores = self.run(
            aten.mul.Scalar, self.run(aten.matmul.default, q, self.run(aten.transpose.int, k, -1, -2)), factor
        )
        if causal:
            ones = self.run(aten.ones_like.default, scores)
            mask = self.run(aten.gt.Scalar, self.run(aten.tril.default, ones), 0)
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            scores = self.run(aten.masked_fill.Scalar, scores, self.run(aten.logical_not.default, mask), -math.inf)
        elif mask is not None:
            scores = self.run(aten.add.Tensor, scores, mask)
        y = self.run(aten.matmul.default, self.run(aten.softmax.int, scores, -1), v)
        return self.new("call_function", aten._to_copy.default, (y,), value, {"dtype": value.dtype})

    def wide(self, node: fx.Node) -> fx.Node:
        value = node.meta["val"].to(torch.float32)
        return self.new("call_function", aten._to_copy.default, (node,), value, {"dtype": torch.float32})

    def in_memory_order(self, made: fx.Node, node: fx.Node) -> fx.Node:
        order = self.buffer(node).order
        if order == tuple(range(len(order))):
            return made
        return self.new("call_function", aten.permute.default, (made, list(order)), self.tensor(node).permute(order))


def is_empty(node: fx.Node) -> bool:
    """Whether a node is a tensor without elements, whatever the free dimensions are."""
    value = tensor_of(node)
    return value is not None and any(isinstance(size, int) and size == 0 for size in value.shape)


def positional(node: fx.Node, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
    """All arguments of a call, as its schema orders them, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    rest = node.target._schema.arguments[len(arguments) :]
    return [*arguments, *(options.get(a.name, a.default_value) for a in rest)]


def _key(graph: fx.Graph) -> str:
    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            kind = f"{ELEMENTS.get(value.dtype, value.dtype)}{list(shape_of(value)[0])}"
        else:
            kind = "" if value is None else type(value).__name__
        lines.append(f"{node.name} = {node.op} {node.target} {node.args} {node.kwargs} : {kind}")
    text = "\n".join(lines)
    # Symbols and values by their place, so that equal layers are equal.
    names: dict[str, str] = {}
    return re.sub(r"\b(?:v\d+|[su]\d+)\b", lambda m: names.setdefault(m[0], f"{m[0][0]}'{len(names)}"), text)
