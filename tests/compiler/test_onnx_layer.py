"""DsMoELayer: one node a layer, its body in ONNX Runtime against float64, and what is refused."""

from __future__ import annotations

from typing import Any

import onnx
import onnx.inliner
import pytest
import torch
from torch import Tensor

from dsmoe_compiler.targets.onnx.function import add_functions
from dsmoe_compiler.targets.onnx.layer import LAYER_TYPE, kind_of, layers_of, register_layer
from dsmoe_compiler.targets.onnx.layer_function import add_layer_functions
from dsmoe_compiler.targets.onnx.op import OP_TYPE, nodes_of
from dsmoe_compiler.targets.onnx.routing import translations
from dsmoe_runtime.errors import ArtifactError
from tests.compiler.onnx_nodes import KNOWS_OVERLOADS, skip_without_tokens
from tests.compiler.test_onnx_routing import SIZES, Layers, exported, gate_call, judged, run
from tests.runtime.op_cases import layer_of, moe_arguments, normal, small_config, weight

GATES = {torch.float32: tuple(SIZES), torch.float16: ("V3",), torch.bfloat16: ("v1", "V2")}


def model_of(calls: dict[str, tuple[Any, ...]], dtype: torch.dtype) -> onnx.ModelProto:
    model = exported(Layers(calls, dtype), (normal(5, 42, seed=1),), table=translations(layers=True))
    add_layer_functions(model)
    add_functions(model)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="module", params=GATES, ids=str)
def gates(request):
    """The routed and the shared experts' widths fit each other, else the layers would stay in the portable spelling."""
    calls = {}
    for name in GATES[request.param]:
        call = list(gate_call(name, request.param))
        width, hidden = call[13].shape[2], call[13].shape[1]
        call[20:22] = weight(4 * width, hidden, seed=70), weight(hidden, 2 * width, seed=71)
        call[20:22] = [tensor.to(request.param) for tensor in call[20:22]]
        calls[name] = tuple(call)
    return request.param, calls, model_of(calls, request.param)


@pytest.mark.parametrize("tokens", [0, 1, 5, 256])
def test_bodies_agree_with_float64(gates, tokens):
    skip_without_tokens(tokens)
    dtype, calls, model = gates
    assert [node.op_type for node in model.graph.node].count(LAYER_TYPE) == len(calls)
    x = normal(tokens, 42, seed=tokens).to(dtype).float()
    inlined = onnx.inliner.inline_local_functions(model)
    for how in (model, inlined) if KNOWS_OVERLOADS or len(calls) == 1 else (inlined,):
        outputs = run(how, x)
        for index, call in enumerate(calls.values()):
            judged(outputs[2 * index], outputs[2 * index + 1], x, call, dtype)


def test_weights_stay_as_they_are_and_kinds_have_bodies_of_their_own(gates):
    _, calls, model = gates
    given = sorted(tuple(v.shape) for call in calls.values() for v in call if isinstance(v, Tensor) and v.dim() > 1)
    assert sorted(tuple(t.dims) for t in model.graph.initializer if len(t.dims) > 1) == given
    layers = list(layers_of(model))
    assert len({node.overload for node in layers}) == len(layers) == len(calls)
    assert {f.overload for f in model.functions if f.name == LAYER_TYPE} == {node.overload for node in layers}
    assert len(list(nodes_of(model))) == len(layers)  # each body has its experts as one node


def portable_calls() -> dict[str, tuple[Any, ...]]:
    base = moe_arguments(layer_of(small_config()))
    gated, odd, bias = list(base), list(base), list(base)
    gated[22] = weight(1, 42, seed=55)
    odd[20:22] = weight(62, 42, seed=53), weight(42, 31, seed=54)
    bias[14], bias[20:] = normal(12, 54, seed=50), [None, None, None]
    return {"gated": tuple(gated), "odd": tuple(odd), "one_bias": tuple(bias)}


def test_what_the_kernels_cannot_do_stays_in_the_portable_spelling():
    calls = portable_calls()
    model = exported(Layers(calls, torch.float32), (normal(5, 42, seed=1),), table=translations(layers=True))
    assert not list(layers_of(model))
    assert [node.op_type for node in model.graph.node].count(OP_TYPE) == len(calls)


@pytest.fixture(scope="module")
def once() -> onnx.ModelProto:
    """Without shared experts and biases: three inputs are empty names."""
    call = list(moe_arguments(layer_of(small_config())))
    call[20:] = [None, None, None]
    return exported(
        Layers({"v1": tuple(call)}, torch.float32), (normal(5, 42, seed=1),), table=translations(layers=True)
    )


@pytest.fixture
def plain(once) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(once)
    return copy


def set_attribute(node: onnx.NodeProto, name: str, value: object) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("topk", 3, "'topk' is unknown"),
        ("top_k", 13, "12"),
        ("top_k", "three", "must be a int"),
        ("score", "tanh", "tanh"),
        ("layout", "packed", "packed"),
        ("renormalize", 2, "renormalize 2"),
        ("router_dtype", "half", "half"),
    ],
)
def test_edited_attributes_are_refused(plain, name, value, words):
    (node,) = layers_of(plain)
    set_attribute(node, name, value)
    with pytest.raises(ArtifactError, match=words):
        kind_of(node, plain)


def test_missing_inputs_and_attributes_are_refused(plain):
    (node,) = layers_of(plain)
    kind = kind_of(node, plain)
    assert kind.given == (True, True, False, False, True, True, False, False, False, False)
    gate_up, node.input[4] = node.input[4], ""
    with pytest.raises(ArtifactError, match="its inputs"):
        kind_of(node, plain)
    node.input[4] = gate_up
    del node.attribute[0]
    with pytest.raises(ArtifactError, match="is missing"):
        kind_of(node, plain)


def test_shapes_are_inferred(plain):
    register_layer()
    register_layer()
    inferred = onnx.shape_inference.infer_shapes(plain, strict_mode=True)
    (node,) = layers_of(plain)
    shapes = {v.name: v.type.tensor_type for v in [*inferred.graph.value_info, *inferred.graph.output]}
    chosen = shapes[node.output[1]]
    assert chosen.elem_type == onnx.TensorProto.INT64
    assert chosen.shape.dim[1].dim_value == 3
