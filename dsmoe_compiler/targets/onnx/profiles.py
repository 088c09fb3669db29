"""What an ONNX model relies on where it runs: nothing, our library with kernels for a GPU, or ONNX Runtime's own MoE.

portable      the op with its function body: any ONNX Runtime; with our library, faster
ort-cuda      libdsmoe_ort.so and kernels/ lie beside the model, and ONNX Runtime's CUDA provider runs the op by them;
              decode.onnx beside it is the step of one token in a cache of fixed slots
ort-contrib   every op is a com.microsoft.MoE, where that computes the same
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from dsmoe_compiler.capture import EXPERTS_OP, MOE_OP
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.targets.onnx import contrib
from dsmoe_compiler.targets.onnx.decode_ops import ATTENTION, GEMV
from dsmoe_compiler.targets.onnx.decode_step import NoDecodeStep, decode_step
from dsmoe_compiler.targets.onnx.export import experts_nodes
from dsmoe_compiler.targets.onnx.function import add_functions, minimum_onnxruntime
from dsmoe_compiler.targets.onnx.grouped_attention import dims
from dsmoe_compiler.targets.onnx.layer import why_not
from dsmoe_compiler.targets.onnx.layer_function import add_layer_functions
from dsmoe_compiler.targets.onnx.nodes import shape
from dsmoe_compiler.targets.onnx.op import DOMAIN
from dsmoe_compiler.targets.onnx.opening import DECODE, MODEL
from dsmoe_compiler.targets.onnx.session import KERNELS, LIBRARY, PROVIDERS, TYPES
from dsmoe_runtime.ops.activation import has_gate
from dsmoe_runtime.ort_library.layer import DecodeAttention, Gemv, Layer, MoELayer, OneToken

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]
NAMES = {number: str(dtype).removeprefix("torch.") for dtype, number in TYPES.items()}


def lowered(proto: onnx.ModelProto, layers: list[str], config: CompileConfig) -> tuple[onnx.ModelProto, str, list[str]]:
    """The model as its profile has it, the oldest ONNX Runtime that runs it, and the names of the layers' nodes.

    Raises: TargetError with the node that the profile cannot express.
    """
    assert config.target is not None
    if config.profile == "ort-contrib":
        provider = PROVIDERS[config.target]
        proto = contrib.lower_to_contrib(proto, provider)
        nodes = [node for node in proto.graph.node if (node.domain, node.op_type) == (contrib.CONTRIB, "MoE")]
        for node, layer in zip(nodes, layers, strict=True):
            node.name = f"{layer}/MoE"
        least = contrib.LEAST_ONNXRUNTIME[provider]
    else:
        if config.functions:
            add_layer_functions(proto)  # they have DsMoE nodes of their own
            add_functions(proto)
        nodes, least = experts_nodes(proto), minimum_onnxruntime(proto)
    for key, value in {"profile": config.profile, "minimum_onnxruntime": least}.items():
        proto.metadata_props.add(key=f"dsmoe.{key}", value=value)
    return proto, least, [node.name for node in nodes]


def accompany(
    folder: Path, graph: fx.GraphModule, proto: onnx.ModelProto, slots: int, config: CompileConfig, say: Say
) -> dict[str, Any]:
    """Put beside the model what its profile needs; what the manifest says of it. `slots`: of a cache for one token."""
    if config.profile != "ort-cuda":
        return {}
    from dsmoe_runtime.ort_library.build import library
    from dsmoe_runtime.ort_library.programs import CAPABILITIES, write

    shutil.copyfile(library(), folder / LIBRARY)
    (folder / KERNELS).mkdir()
    facts: dict[str, Any] = {"library": LIBRARY, "kernels": KERNELS, "capabilities": [list(c) for c in CAPABILITIES]}
    kinds: list[Layer | MoELayer | OneToken] = [*sizes(graph)]
    try:
        one = decode_step(proto, slots)
    except NoDecodeStep as reason:
        say(f"onnx: no {DECODE}, single tokens go through {MODEL}: {reason}")
    else:
        (folder / DECODE).write_bytes(one.SerializeToString())
        say(f"onnx: {len(one.graph.node)} nodes for one token in {DECODE}, {slots:,} slots")
        kinds += one_token_kinds(one)
        facts["decode"] = DECODE
    write(kinds, folder / KERNELS, progress=lambda line: say(f"kernels: {line}"))
    return facts


def one_token_kinds(proto: onnx.ModelProto) -> list[OneToken]:
    """The kinds of products and attentions in decode.onnx, as kernels are made for them."""
    from onnx import helper

    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    cache = {value.name: dims(value) for value in proto.graph.input}
    found: list[OneToken] = []
    for node in proto.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, GEMV):
            weight = held[node.input[1]]
            found.append(Gemv(weight.dims[1], weight.dims[0], NAMES[weight.data_type]))
        elif (node.domain, node.op_type) == (DOMAIN, ATTENTION):
            said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            angles, (_, groups, slots, width) = held[node.input[1]], cache[node.input[4]]
            heads = (said["num_heads"], groups, width, slots, angles.dims[0], said["scale"])
            found.append(DecodeAttention(*heads, NAMES[angles.data_type]))
    return list(dict.fromkeys(found))


def sizes(graph: fx.GraphModule) -> list[Layer | MoELayer]:
    """The kinds of layers in a graph, as kernels are made for them."""
    found: list[Layer | MoELayer] = []
    for node in graph.graph.nodes:
        if node.target is MOE_OP:
            found.append(whole(node.args))
        elif node.target is EXPERTS_OP:
            found.append(routed(int(node.args[1].meta["val"].shape[1]), node.args[3:11]))
    return list(dict.fromkeys(found))


def routed(top_k: int, operands: Any) -> Layer:
    """A layer's routed experts, from their operands of `dsmoe::experts`."""
    gate_up, _, *biases, activation, alpha, limit, layout = operands
    experts, rows, columns = shape(gate_up)
    hidden, wide = (rows, columns) if layout.endswith("_transposed") else (columns, rows)
    form = (activation, float(alpha), float(limit), layout, *(bias is not None for bias in biases))
    return Layer(hidden, wide // (2 if has_gate(layout) else 1), experts, top_k, dtype(gate_up), *form)


def whole(operands: Any) -> Layer | MoELayer:
    """A layer with its gate and shared experts, or its routed ones alone where those stay operators of their own."""
    router, gate, (_, down, shared_gate) = operands[1:4], operands[4:13], operands[21:]
    layer = routed(int(gate[0]), operands[13:21])
    layout = layer.layout
    if layer.gate_up_bias != layer.down_bias or why_not(
        layer.experts, layer.top_k, layer.width, layout, down and down.meta["val"], shared_gate
    ):
        return layer
    score, n_group, topk_group, group_score, renormalize, eps, scale, router_dtype = gate[1:]
    weight, bias, selection_bias = (None if tensor is None else dtype(tensor) for tensor in router)
    return MoELayer(
        layer, score, n_group, topk_group, group_score, renormalize, float(eps), float(scale), router_dtype,
        weight or "", bias, selection_bias, 0 if down is None else shape(down)[1],
    )  # fmt: skip


def dtype(node: fx.Node) -> str:
    """As in "bfloat16"."""
    return str(node.meta["val"].dtype).removeprefix("torch.")
