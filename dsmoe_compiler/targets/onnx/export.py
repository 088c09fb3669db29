"""A fused graph to an ONNX model: one node for each layer's experts, its meaning beside it, names that people can read.

The weights stay where they are: `ir.Model` refers to the graph's own tensors until `external` has written them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from dsmoe_compiler.targets.onnx.layer import LAYER_TYPE
from dsmoe_compiler.targets.onnx.op import DOMAIN, OP_TYPE, register_schema
from dsmoe_compiler.targets.onnx.routing import translations
from dsmoe_compiler.targets.onnx.spelling import respell
from dsmoe_runtime.errors import TargetError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
INLINE = 1024  # bytes; larger constants are weights: not computed with while exporting, which would copy them
DIMENSIONS = ("batch", "sequence", "past")


def translate(
    graph: fx.GraphModule, inputs: tuple[Any, ...], free: Any, *, what: str, native: bool, layers: bool = False
) -> ir.Model:
    """`graph`, a fused step, in ONNX. It is rewritten on the way. Raises: TargetError that names `what`.

    `native`, `layers`: as of `routing.translations`.
    Inputs and outputs are `input_ids`, `past_key_values.N.key`, ... and `logits`, `experts`, `present.N.key`, ...
    """
    from torch.onnx.errors import OnnxExporterError

    register_schema()
    respell(graph)
    past = [f"{number}.{side}" for number in range(len(inputs[1]) // 2) for side in ("key", "value")]
    with torch.no_grad(), quiet():
        program = torch.export.export(graph, inputs, dynamic_shapes=free, strict=False)
        try:
            translated = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET,
                custom_translation_table=translations(native=native, layers=layers), optimize=False,
                input_names=["input_ids", *(f"past_key_values.{name}" for name in past)],
                output_names=["logits", "experts", *(f"present.{name}" for name in past)], verbose=False,
            )  # fmt: skip
        except OnnxExporterError as error:
            raise TargetError(f"{what} cannot be written as ONNX: {cause(error)}") from error
    assert translated is not None
    return simplified(translated.model)


def simplified(model: ir.Model) -> ir.Model:
    """Constants folded, what nobody reads dropped; nothing that would copy a weight."""
    from onnxscript.optimizer import optimize_ir

    def should_fold(node: ir.Node) -> bool | None:
        values = [value for value in node.inputs if value is not None and value.is_initializer()]
        weights = [v for v in values if v.const_value is not None and v.const_value.nbytes > INLINE]
        return False if weights else None

    optimize_ir(model, should_fold=should_fold)
    return model


def finished(model: ir.Model, layers: list[str]) -> onnx.ModelProto:
    """The file's contents: readable names, nothing of the machine that wrote it.

    `layers` are the names of the layers in the order of their nodes.
    """
    import onnx_ir as ir

    from dsmoe_compiler.version import __version__

    proto = ir.serde.serialize_model(model)
    proto.producer_name, proto.producer_version = "dsmoe-compiler", __version__
    proto.graph.name = "step"
    name_dimensions(proto.graph)
    strip(proto)
    nodes = experts_nodes(proto)
    assert len(nodes) == len(layers), f"{len(nodes)} nodes for {len(layers)} layers"
    for node, layer in zip(nodes, layers, strict=True):
        node.name = f"{layer}/{node.op_type}"
    outputs = list(proto.graph.output)
    del proto.graph.output[:]
    proto.graph.output.extend([outputs[0], *outputs[2:], outputs[1]])
    return proto


def experts_nodes(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of our own in the order of the layers."""
    return [n for n in proto.graph.node if n.domain == DOMAIN and n.op_type in (OP_TYPE, LAYER_TYPE)]


def name_dimensions(graph: onnx.GraphProto) -> None:
    """Free dimensions by their meaning instead of the tracer's numbers."""
    ids, past = (graph.input[at].type.tensor_type.shape.dim for at in (0, 1))
    names = dict(zip([ids[0].dim_param, ids[1].dim_param, past[2].dim_param], DIMENSIONS, strict=True))
    assert len(names.keys() - {""}) == len(DIMENSIONS), names
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = renamed(dim.dim_param, names)


def renamed(expression: str, names: dict[str, str]) -> str:
    import re

    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), expression)


def strip(proto: onnx.ModelProto) -> None:
    """Drop what the exporter notes for itself: stack traces with paths, modules, its own names of things."""
    del proto.metadata_props[:]
    proto.doc_string = ""
    graph = proto.graph
    del graph.metadata_props[:]
    graph.doc_string = ""
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


def cause(error: BaseException) -> str:
    """The innermost reason of an exporter's error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter's remarks on what it does, and on torchvision, are not the user's concern."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
