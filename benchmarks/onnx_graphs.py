"""ONNX graphs that hold many calls, for timing: one call's graph, again and again, over the same few weights.

Weights are graph inputs, so that nothing is copied into a model: sessions read torch's memory where it lies. Inputs of
a call are called `x/3`, weights `gate_up.1`: call 3, copy 1 of the weights.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_shapes import Shape

OPSET = 23
TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}  # as onnx.TensorProto numbers them
SILU: dict[str, Any] = {"activation": "silu", "alpha": 1.0, "limit": 1.0, "layout": "concat"}
GATE_NAMES = (
    "top_k", "score", "n_group", "topk_group", "group_score", "renormalize", "eps", "scale", "router_dtype",
)  # fmt: skip


def ours(shape: Shape, dtype: torch.dtype) -> Any:
    """dsmoe::DsMoE alone."""
    from onnx import helper

    of_call = [_input("x", dtype, "T", shape.hidden), *_routing(shape)]
    inputs = [*of_call, *_stacks(shape, dtype)]
    names = [value.name for value in inputs]
    node = helper.make_node("DsMoE", names, ["y"], domain="dsmoe", **SILU)
    return _model([node], inputs, [_input("y", dtype, "T", shape.hidden)])


def contrib(shape: Shape, dtype: torch.dtype) -> Any:
    """com.microsoft::MoE alone, given log weights in `row [T, E]`; gate and up interleaved."""
    from onnx import helper

    inputs = [_input("x", dtype, "T", shape.hidden), _input("row", dtype, "T", shape.experts), *_stacks(shape, dtype)]
    node = helper.make_node(
        "MoE", ["x", "row", "gate_up", "", "down"], ["y"], domain="com.microsoft", k=shape.top_k,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        normalize_routing_weights=1,
    )  # fmt: skip
    return _model([node], inputs, [_input("y", dtype, "T", shape.hidden)])


def whole(shape: Shape, dtype: torch.dtype, shared_width: int) -> Any:
    """dsmoe::DsMoELayer alone: the gate of the paper's, routed and shared experts in one node."""
    from onnx import helper

    gate: dict[str, Any] = dict(zip(GATE_NAMES, gate_of(shape), strict=True))
    inputs = _layer_inputs(shape, dtype, shared_width)
    at = ["x", "router", "", "", "gate_up", "down", "", "", "joined", "last"]
    node = helper.make_node("DsMoELayer", at, ["y", "chosen"], domain="dsmoe", **gate, **SILU)
    outputs = [_input("y", dtype, "T", shape.hidden), _input("chosen", torch.int64, "T", shape.top_k)]
    return _model([node], inputs, outputs)


def contrib_layer(shape: Shape, dtype: torch.dtype, shared_width: int) -> Any:
    """The layer around com.microsoft::MoE, which routes by itself, from logits in dtype; gate and up interleaved."""
    from onnx import helper

    made = helper.make_node
    swish = [made("Sigmoid", ["gate"], ["open"]), made("Mul", ["gate", "open"], ["opened"])]
    nodes = [
        made("Gemm", ["x", "router"], ["logits"], transB=1),
        made(
            "MoE", ["x", "logits", "gate_up", "", "down"], ["routed"], domain="com.microsoft", k=shape.top_k,
            activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
            normalize_routing_weights=0,
        ),
        made("Gemm", ["x", "joined"], ["joint"], transB=1),
        made("Cast", ["joint"], ["wide"], to=TYPES[torch.float32]),
        made("Split", ["wide"], ["gate", "up"], axis=1, num_outputs=2),
        *swish,
        made("Mul", ["opened", "up"], ["inner"]),
        made("Cast", ["inner"], ["narrow"], to=TYPES[dtype]),
        made("Gemm", ["narrow", "last"], ["beside"], transB=1),
        made("Add", ["routed", "beside"], ["y"]),
    ]  # fmt: skip
    return _model(nodes, _layer_inputs(shape, dtype, shared_width), [_input("y", dtype, "T", shape.hidden)])


def gate_of(shape: Shape) -> tuple[Any, ...]:
    """The paper's gate, as the operators take it."""
    return (shape.top_k, "softmax", 1, 1, "max", False, 1e-20, 1.0, "float32")  # top_k ... router_dtype


@cache
def layer(shape: Shape, dtype: torch.dtype, shared_width: int) -> Any:
    """A whole layer of the paper's in standard operators and DsMoE, exported from dsmoe::moe for CUDA."""
    from dsmoe_compiler.targets.onnx.routing import translations

    class Layer(torch.nn.Module):
        def forward(
            self, x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, joined: Tensor, last: Tensor
        ) -> Any:
            gate, experts = (router, None, None, *gate_of(shape)), (gate_up, down, None, None, *SILU.values())
            return torch.ops.dsmoe.moe(x, *gate, *experts, joined, last, None)

    sizes = {
        "x": (16, shape.hidden), "router": (shape.experts, shape.hidden),
        "gate_up": (shape.experts, 2 * shape.width, shape.hidden), "down": (shape.experts, shape.hidden, shape.width),
        "joined": (2 * shared_width, shape.hidden), "last": (shape.hidden, shared_width),
    }  # fmt: skip
    # The gate is float32: of an initializer the cast is folded.
    dtypes = [torch.float32 if name == "router" else dtype for name in sizes]
    made = [torch.empty(size, dtype=each, device="meta") for size, each in zip(sizes.values(), dtypes, strict=True)]
    exported = torch.export.export(
        Layer(), tuple(made),
        dynamic_shapes=({0: torch.export.Dim("T", min=1, max=1 << 20)}, *[None] * 5), strict=False,
    )  # fmt: skip
    program = torch.onnx.export(
        exported, dynamo=True, opset_version=OPSET, custom_translation_table=translations(native=True),
        input_names=list(sizes), output_names=["y", "chosen"], verbose=False,
    )  # fmt: skip
    assert program is not None
    return program.model_proto


def repeated(model: Any, calls: int, copies: int, of_call: set[str]) -> Any:
    """`calls` times the model's nodes; inputs not in `of_call` are weights, of which there are so many copies."""
    made = copy.deepcopy(model)
    graph, constants = made.graph, {value.name for value in model.graph.initializer}
    weights = {value.name for value in model.graph.input} - of_call
    for part in (graph.node, graph.input, graph.output, graph.value_info):
        del part[:]

    def named(name: str, call: int) -> str:
        if name in constants or not name:
            return name
        return f"{name}.{call % copies}" if name in weights else f"{name}/{call}"

    for call in range(calls):
        for index, node in enumerate(model.graph.node):
            added = graph.node.add()
            added.CopyFrom(node)
            added.name = f"{node.op_type}.{index}/{call}"
            for names in (added.input, added.output):
                names[:] = [named(name, call) for name in names]
        for value in (*model.graph.input, *model.graph.output):
            if value.name in weights and call >= copies:
                continue
            added = (graph.input if value in model.graph.input else graph.output).add()
            added.CopyFrom(value)
            added.name = named(value.name, call)
    return made


def _layer_inputs(shape: Shape, dtype: torch.dtype, shared_width: int) -> list[Any]:
    """The router has the dtype of the rest, as the paper's checkpoint has it."""
    return [
        _input("x", dtype, "T", shape.hidden), _input("router", dtype, shape.experts, shape.hidden),
        *_stacks(shape, dtype),
        _input("joined", dtype, 2 * shared_width, shape.hidden), _input("last", dtype, shape.hidden, shared_width),
    ]  # fmt: skip


def _routing(shape: Shape) -> list[Any]:
    return [_input("experts", torch.int64, "T", shape.top_k), _input("weights", torch.float32, "T", shape.top_k)]


def _stacks(shape: Shape, dtype: torch.dtype) -> list[Any]:
    return [
        _input("gate_up", dtype, shape.experts, 2 * shape.width, shape.hidden),
        _input("down", dtype, shape.experts, shape.hidden, shape.width),
    ]


def _input(name: str, dtype: torch.dtype, *sizes: int | str) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, TYPES[dtype], sizes)


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Any:
    from onnx import helper

    domains = [helper.make_opsetid(name, number) for name, number in (("", OPSET), ("dsmoe", 1), ("com.microsoft", 1))]
    return helper.make_model(helper.make_graph(nodes, "calls", inputs, outputs), opset_imports=domains, ir_version=10)
