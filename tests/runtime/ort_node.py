"""One DsMoE node as an ONNX model, run by ONNX Runtime with our library; inputs and outputs are torch's tensors.

Half-precision tensors enter and leave as float32 through Cast nodes, which changes no bit: numpy has no bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from dsmoe_runtime.ort_library.build import library
from tests.runtime.op_cases import attributes

TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
INPUTS = ("x", "experts", "weights", "gate_up", "down", "gate_up_bias", "down_bias")


def model(
    names: Sequence[str], dtype: torch.dtype, given: dict[str, Any], functions: Sequence[onnx.FunctionProto] = ()
) -> onnx.ModelProto:
    """x, experts, ... -> DsMoE with the attributes `given` -> y; inputs that are not in `names` are absent."""
    nodes, graph_inputs = [], []
    for name in names:
        integers, half = name == "experts", name not in ("experts", "weights") and dtype != torch.float32
        kind = TensorProto.INT64 if integers else TensorProto.FLOAT
        graph_inputs.append(helper.make_tensor_value_info(name, kind, None))
        if half:
            nodes.append(helper.make_node("Cast", [name], [f"{name}_half"], to=TYPES[dtype]))
    halves = {output for node in nodes for output in node.output}
    operands = [f"{n}_half" if f"{n}_half" in halves else n if n in names else "" for n in INPUTS]
    while not operands[-1]:
        operands.pop()
    nodes.append(helper.make_node("DsMoE", operands, ["y_node"], domain="dsmoe", **given))
    nodes.append(helper.make_node("Cast", ["y_node"], ["y"], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes, "one_node", graph_inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("dsmoe", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def session(made: onnx.ModelProto, *, threads: int = 1, with_library: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if with_library:
        options.register_custom_ops_library(str(library()))
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def opened(
    case: dict[str, Any], activation: str = "silu", layout: str = "concat", *, threads: int = 1
) -> onnxruntime.InferenceSession:
    """A session for cases like this one."""
    names = [name for name in INPUTS if case[name] is not None]
    return session(model(names, case["x"].dtype, attributes(activation, layout)), threads=threads)


def answer(opened: onnxruntime.InferenceSession, case: dict[str, Any]) -> Tensor:
    """y of a case, in x's dtype."""
    feeds = {
        name: (value.float() if value.is_floating_point() else value).contiguous().numpy()
        for name, value in case.items()
        if value is not None
    }
    return torch.from_numpy(opened.run(None, feeds)[0]).to(case["x"].dtype)
