"""The schema of DsMoE in onnx, and the checks of nodes in files that somebody edited."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper
from onnx.parser import parse_model

from dsmoe_compiler.targets.onnx.function import add_functions
from dsmoe_compiler.targets.onnx.op import DOMAIN, OP_TYPE, VERSION, Attributes, check_nodes, register_schema
from dsmoe_runtime.agreement import row_error
from dsmoe_runtime.errors import ArtifactError
from tests.compiler.onnx_nodes import node_model, session
from tests.runtime.op_cases import COMBINATIONS, expert_case, laid_out, normal, weight


@pytest.fixture(autouse=True, scope="module")
def schema():
    register_schema()
    register_schema()  # once more is harmless


@pytest.fixture
def model():
    return node_model(expert_case(3))


@pytest.fixture
def node(model):
    return model.graph.node[1]


def test_the_schema_is_known_to_onnx():
    schema = onnx.defs.get_schema(OP_TYPE, VERSION, DOMAIN)
    assert [parameter.name for parameter in schema.inputs][:5] == ["x", "experts", "weights", "gate_up", "down"]
    defaults = {name: helper.get_attribute_value(a.default_value) for name, a in schema.attributes.items()}
    assert defaults == {"activation": b"silu", "alpha": 1.0, "limit": 0.0, "layout": b"concat"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("activation", "layout"), COMBINATIONS)
def test_every_kind_of_node_passes(activation, layout, bias):
    model = node_model(laid_out(expert_case(3, bias=bias), layout), activation, layout)
    onnx.checker.check_model(model, full_check=True)
    ((_, attributes, biases),) = check_nodes(model)
    assert (attributes.activation, attributes.layout, biases) == (activation, layout, bias)


def test_shape_inference_gives_y(model):
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
    values = {value.name: value.type.tensor_type for value in inferred.graph.value_info}
    assert [dim.dim_param for dim in values["after"].shape.dim] == ["T", "H"]
    assert values["after"].elem_type == onnx.TensorProto.FLOAT


def test_shape_inference_refuses_weights_that_do_not_fit(model):
    model.graph.initializer[1].dims[1] -= 1
    model.graph.initializer[1].raw_data = model.graph.initializer[1].raw_data[: -12 * 27 * 4]
    with pytest.raises(onnx.shape_inference.InferenceError, match=r"down .* H of its \[E, H, I\] should be 42"):
        onnx.shape_inference.infer_shapes(model, strict_mode=True)
    with pytest.raises(ArtifactError, match=r"down is \[12, 41, 27\]"):
        check_nodes(model)


def test_an_unknown_attribute(model, node):
    """The checker takes it where our schema is not registered: in every other process."""
    node.attribute.append(helper.make_attribute("clamp", 1.0))
    with pytest.raises(ArtifactError, match=r"'after'.* 'clamp' is unknown to version 1"):
        check_nodes(model)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("activation", "swish", "'swish'; it must be one of silu"),
        ("layout", "rows", "'rows'; it must be one of concat"),
        ("layout", "ungated", r"gate_up is \[12, 54, 42\]|down is \[12, 42, 27\]"),
        ("layout", "concat_transposed", r"gate_up is|down is"),
        ("alpha", 1, "'alpha' is 1; it must be a float"),
        ("limit", float("nan"), "limit is nan; it must be finite"),
        ("activation", 3.0, "'activation' is 3.0; it must be a str"),
    ],
)
def test_values_without_a_meaning(model, node, name, value, message):
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
    with pytest.raises(ArtifactError, match=message):
        check_nodes(model)


def test_attributes_that_are_left_out_have_defaults(model, node):
    del node.attribute[:]
    assert check_nodes(model)[0][1] == Attributes("silu", 1.0, 0.0, "concat")


@pytest.mark.parametrize(("version", "message"), [(2, "imports version 2"), (None, "does not import it")])
def test_another_version_of_the_domain(model, version, message):
    del model.opset_import[1]
    if version:
        model.opset_import.append(helper.make_opsetid(DOMAIN, version))
    with pytest.raises(ArtifactError, match=f"{message}; this tool knows version 1"):
        check_nodes(model)


def test_inputs_that_are_missing_or_too_many(model, node):
    node.input.append("down")
    with pytest.raises(ArtifactError, match="one bias is given and the other is not"):
        check_nodes(model)
    node.input.extend(["down", "down"])
    with pytest.raises(ArtifactError, match="the op takes x, experts"):
        check_nodes(model)
    del node.input[4:]
    with pytest.raises(ArtifactError, match="the op takes x, experts"):
        check_nodes(model)


def test_weights_of_two_types(model):
    tensor = model.graph.initializer[1]
    tensor.data_type, tensor.raw_data = onnx.TensorProto.FLOAT16, tensor.raw_data[: len(tensor.raw_data) // 2]
    with pytest.raises(ArtifactError, match="its weights have 2 types"):
        check_nodes(model)


def test_nodes_that_share_a_body_must_share_a_meaning(model, node):
    """An edited attribute changes nothing in a runtime without the library: the body has it written out."""
    second = model.graph.node.add()
    second.CopyFrom(node)
    second.output[0] = "other"
    add_functions(model)
    check_nodes(model)
    second.attribute[0].s = b"gelu"
    with pytest.raises(ArtifactError, match=r"'other'.* its function is that of a node with other attributes"):
        check_nodes(model)


def test_nodes_inside_other_nodes_are_checked(model, node):
    branch = helper.make_graph([node], "branch", [], [helper.make_tensor_value_info("after", 1, None)])
    node.CopyFrom(helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch))
    assert len(check_nodes(model)) == 2
    node.attribute[0].g.node[0].attribute.append(helper.make_attribute("clamp", 1.0))
    with pytest.raises(ArtifactError, match="'clamp'"):
        check_nodes(model)


def test_the_example_of_the_specification():
    """The graph in docs/onnx-op.md is V3's gate and a layer, to rounding."""
    text = (Path(__file__).parents[2] / "docs" / "onnx-op.md").read_text()
    model = parse_model("<ir_version" + text.split("```\n<ir_version")[1].split("```")[0])
    onnx.checker.check_model(model, full_check=True)
    add_functions(model)
    x, router, bias = normal(33, 64, seed=1), weight(20, 64, seed=2), 0.1 * normal(20, seed=3)
    gate_up, down = weight(20, 96, 64, seed=4), weight(20, 64, 48, seed=5)
    given = {"x": x, "router": router, "bias": bias, "gate_up": gate_up, "down": down}
    (y,) = session(model).run(None, {name: value.numpy() for name, value in given.items()})
    gate = (None, bias, 4, "sigmoid", 5, 2, "top2", True, 0.0, 2.5, "float32")
    experts = (gate_up, down, None, None, "silu", 1.0, 0.0, "concat", None, None, None)
    expected, _ = torch.ops.dsmoe.moe(x, router, *gate, *experts)
    assert row_error(torch.from_numpy(y), expected).max() < 16 * torch.finfo(torch.float32).eps
