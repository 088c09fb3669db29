"""One DsMoE node between a producer and a consumer, and how it is run, for the tests of the ONNX target."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.parser import parse_model
from torch import Tensor

from dsmoe_compiler.targets.onnx.function import OVERLOADS_SINCE
from tests.runtime.op_cases import ALPHA, LIMIT

NAMES = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}
NUMBERS = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}
INSTALLED = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
KNOWS_OVERLOADS = tuple(map(int, OVERLOADS_SINCE.split("."))) <= INSTALLED
WEIGHTS = ("gate_up", "down", "gate_up_bias", "down_bias")


def array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def initializers(model: onnx.ModelProto, case: dict[str, Any]) -> None:
    """The weights of a case, as laid out, into the file."""
    kept = [name for name in WEIGHTS if case[name] is not None]
    model.graph.initializer.extend(numpy_helper.from_array(array(case[name]), name) for name in kept)


def node_model(case: dict[str, Any], activation: str = "silu", layout: str = "concat") -> onnx.ModelProto:
    """x and weights in, y out, all float32 outside the node, whose dtype is the case's; no function body yet."""
    dtype = case["x"].dtype
    names = [name for name in WEIGHTS if case[name] is not None]
    model = parse_model(
        f"""<ir_version: 10, opset_import: ["" : 23, "dsmoe" : 1]>
        layer (float[T, H] x, int64[T, K] experts, float[T, K] weights) => (float[T, H] y) {{
            before = Cast<to = {NUMBERS[dtype]}>(x)
            after = dsmoe.DsMoE<activation = "{activation}", alpha = {ALPHA}, limit = {LIMIT}, layout = "{layout}">(
                before, experts, weights, {", ".join(names)})
            y = Cast<to = 1>(after)
        }}"""
    )
    initializers(model, case)
    return model


def feeds(case: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        "x": case["x"].float().numpy(),
        "experts": case["experts"].numpy(),
        "weights": case["weights"].numpy(),
    }


def session(model: onnx.ModelProto, *, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def answer(model: onnx.ModelProto, case: dict[str, Any], *, threads: int = 1) -> Tensor:
    """y in ONNX Runtime on a CPU, in the dtype of the case."""
    (y,) = session(model, threads=threads).run(None, feeds(case))
    return torch.from_numpy(y).to(case["x"].dtype)


def skip_without_tokens(tokens: int) -> None:
    """Of no tokens, TopK ends the process with a floating-point exception in ONNX Runtime before 1.31."""
    if tokens == 0 and INSTALLED < (1, 31):
        pytest.skip("a TopK of no rows would end the process")
