"""ONNX Runtime's own mixture of experts (com.microsoft.MoE) as a candidate: float32, on the same weights.

It routes by itself: softmax over the logits, the largest K, not renormalised. Its SwiGLU wants gate and up interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor


def ort_call(
    gate_up: Tensor, down: Tensor, top_k: int, threads: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """A call (x, ids, weights, logits) -> y, or None where onnxruntime is not installed."""
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return None
    import onnxruntime
    from onnx import TensorProto, helper

    experts, _, hidden = gate_up.shape
    joint = torch.stack(gate_up.chunk(2, dim=1), dim=2).flatten(1, 2)
    shapes = {"gate_up": joint.shape, "down": down.shape}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ("T", hidden)), ("logits", ("T", experts)), *shapes.items())
    ]
    node = helper.make_node(
        "MoE", ["x", "logits", "gate_up", "", "down"], ["y"], domain="com.microsoft", k=top_k,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        normalize_routing_weights=0,
    )  # fmt: skip
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("T", hidden))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "moe", inputs, [output]), opset_imports=opsets, ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
    constant = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy())
        for name, value in (("gate_up", joint), ("down", down))
    }

    def call(x: Tensor, ids: Tensor, factors: Tensor, logits: Tensor) -> Tensor:
        fed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(t.numpy()) for name, t in (("x", x), ("logits", logits))}
        return torch.from_numpy(session.run_with_ort_values(["y"], fed | constant)[0].numpy())

    return call
