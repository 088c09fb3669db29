"""A model of one node of ours, alone or between two standard ones, its session, and a run over torch's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_runtime.ort_library.layer import Layer, MoELayer

TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}  # as onnx.TensorProto numbers them
OPS: dict[str, Any] = {"DsMoE": Layer, "DsMoELayer": MoELayer}


def model(case: dict[str, Any], attributes: dict[str, Any], *, op: str = "DsMoE", beside: bool = False) -> bytes:
    """All of the case's tensors are inputs, with T free; beside: `y = op(x + x, ...) + x`. Experts are `chosen`."""
    from onnx import helper

    names = OPS[op].inputs
    of_tokens = [name for name in names if name in ("x", "experts", "weights")]

    def value(name: str, kind: int, sizes: Any) -> Any:
        return helper.make_tensor_value_info(name, kind, sizes)

    given = {name: case[name] for name in names if case[name] is not None}
    inputs = ["doubled" if beside and name == "x" else name if name in given else "" for name in names]
    while not inputs[-1]:
        inputs.pop()
    taken = ["routed" if beside else "y", "chosen"][: len(OPS[op].outputs)]
    nodes = [helper.make_node(op, inputs, taken, domain="dsmoe", **attributes)]
    if beside:
        doubled = helper.make_node("Add", ["x", "x"], ["doubled"])
        nodes = [doubled, *nodes, helper.make_node("Add", ["routed", "x"], ["y"])]
    sizes = {name: ["T", *each.shape[1:]] if name in of_tokens else each.shape for name, each in given.items()}
    values = [value(name, TYPES[each.dtype], sizes[name]) for name, each in given.items()]
    outputs = [value("y", TYPES[case["x"].dtype], sizes["x"]), value("chosen", TYPES[torch.int64], ["T", "K"])]
    graph = helper.make_graph(nodes, "one layer", values, outputs[: len(taken)])
    domains = [helper.make_opsetid("", 23), helper.make_opsetid("dsmoe", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()


def session(
    made: bytes, library: Path, *, kernels: Path | str | None = None, device: str = "cpu", graph: bool = False
) -> Any:
    """On the provider of the device alone; on a GPU in torch's stream."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if kernels is not None:
        options.add_session_config_entry("dsmoe.kernels", str(kernels))
    options.register_custom_ops_library(str(library))
    provider: Any = "CPUExecutionProvider"
    if device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        stream = str(torch.cuda.current_stream().cuda_stream)
        settings = {"user_compute_stream": stream, "enable_cuda_graph": str(int(graph))}
        provider = ("CUDAExecutionProvider", settings)
    return onnxruntime.InferenceSession(made, options, providers=[provider])


def bound(made: Any, case: dict[str, Any], y: Tensor, chosen: Tensor | None = None) -> Any:
    """The case's tensors as inputs where they lie, and `y` as output; they must outlive what is returned."""
    binding = made.io_binding()
    for bind, tensors in ((binding.bind_input, case), (binding.bind_output, {"y": y, "chosen": chosen})):
        for name, tensor in tensors.items():
            if tensor is not None:
                bind(name, tensor.device.type, 0, TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())
    return binding


def run(made: Any, case: dict[str, Any]) -> Tensor:
    """y, in memory that held NaN."""
    y = torch.full_like(case["x"], torch.nan)
    made.run_with_iobinding(bound(made, case, y))
    return y
