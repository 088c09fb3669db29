"""DsMoELayer's body: the portable spelling of the layer, exported once for each kind of node.

    y, experts = DsMoELayer(x, router_weight, ..., shared_down)
    ->
    logits = Gemm(Cast(x), router_weight); ...; y_routed = DsMoE(x, experts, weights, gate_up, down); y = y_routed + ...

Sizes that the routing has to know (E, K, groups) are the node's own; the others are small while it is exported, for
the operators in the body ask the tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsmoe_compiler.targets.onnx.export import OPSET, quiet, simplified
from dsmoe_compiler.targets.onnx.layer import INPUTS, LAYER_TYPE, Kind, fields, kind_of, layers_of
from dsmoe_compiler.targets.onnx.op import DOMAIN, VERSION
from dsmoe_compiler.targets.onnx.routing import translations
from dsmoe_runtime.ops.activation import has_gate

if TYPE_CHECKING:
    import onnx

SIZE = 16  # of all that a body does not depend on
TORCH = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}


class One(nn.Module):
    """One `dsmoe::moe` whose weights are inputs."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(tensors)
        x, *weights = (next(given) if there else None for there in self.kind.given)
        gate = self.kind.gate._replace(renormalize=bool(self.kind.gate.renormalize))
        router, experts, shared = weights[:3], weights[3:7], weights[7:]
        return torch.ops.dsmoe.moe(x, *router, *gate, *experts, *self.kind.experts, *shared, None)


def layer_function(kind: Kind, overload: str) -> onnx.FunctionProto:
    """The body for nodes of this kind."""
    import onnx_ir as ir

    inputs = examples(kind)
    free = tuple({0: torch.export.Dim("tokens")} if at == 0 else None for at in range(len(inputs)))
    names = [name for (name, _, _), there in zip(INPUTS, kind.given, strict=True) if there]
    with torch.no_grad(), quiet():
        program = torch.export.export(One(kind), inputs, dynamic_shapes=(free,), strict=False)
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, custom_translation_table=translations(), optimize=False,
            input_names=names, output_names=["y", "chosen"], verbose=False,
        )  # fmt: skip
    assert exported is not None
    graph = ir.serde.serialize_model(simplified(exported.model)).graph
    return as_function(graph, overload)


def as_function(graph: onnx.GraphProto, overload: str) -> onnx.FunctionProto:
    """A graph's nodes as a function's, its constants within."""
    from onnx import helper

    constants = []
    for tensor in graph.initializer:
        node = helper.make_node("Constant", [], [tensor.name])
        node.attribute.append(helper.make_attribute("value", tensor))
        constants.append(node)
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    made = helper.make_function(
        DOMAIN, LAYER_TYPE, [name for name, _, _ in INPUTS], [value.name for value in graph.output],
        [*constants, *graph.node], [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        attributes=list(fields()),
    )  # fmt: skip
    made.overload = overload
    return made


def examples(kind: Kind) -> tuple[Tensor, ...]:
    """Tensors to export with, of the inputs that there are."""
    parts = 2 if has_gate(kind.experts.layout) else 1
    experts, flipped = kind.num_experts, kind.experts.layout.endswith("_transposed")
    wide, narrow = (experts, parts * SIZE, SIZE), (experts, SIZE, SIZE)
    shapes: tuple[tuple[int, ...], ...] = (
        (3, SIZE), (experts, SIZE), (experts,), (experts,),
        (wide[0], wide[2], wide[1]) if flipped else wide, narrow, wide[:2], narrow[:2],
        (parts * SIZE, SIZE), (SIZE, SIZE),
    )  # fmt: skip
    numbers = (kind.dtype, *kind.router_dtypes, *[kind.dtype] * 6)
    return tuple(
        torch.zeros(shape, dtype=TORCH[number])
        for shape, number, there in zip(shapes, numbers, kind.given, strict=True)
        if there
    )


def add_layer_functions(model: onnx.ModelProto) -> None:
    """Give every DsMoELayer node of a model its body, in place; the bodies have DsMoE nodes of their own."""
    kinds: dict[Kind, str] = {}
    for node in layers_of(model):
        kind = kind_of(node, model)
        if kind not in kinds:
            kinds[kind] = f"kind_{len(kinds)}" if kinds else ""
            model.functions.append(layer_function(kind, kinds[kind]))
        node.overload = kinds[kind]
