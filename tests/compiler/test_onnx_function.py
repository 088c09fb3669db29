"""DsMoE's body in standard operators: in ONNX Runtime, inlined, and in onnx's evaluator, against float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from dsmoe_compiler.targets.onnx.function import OVERLOADS_SINCE, add_functions, function, minimum_onnxruntime
from dsmoe_compiler.targets.onnx.op import register_schema
from dsmoe_runtime.agreement import assert_within_budget, within_budget
from dsmoe_runtime.errors import ConfigError, TargetError
from tests.compiler.onnx_nodes import KNOWS_OVERLOADS, answer, feeds, node_model, session
from tests.runtime.op_cases import COMBINATIONS, LAYOUTS, exact, expert_case, laid_out, slot_by_slot

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def whole(case, activation="silu", layout="concat"):
    """A model with one node and its body."""
    model = node_model(laid_out(case, layout), activation, layout)
    add_functions(model)
    return model


def judge(y, case, activation="silu", layout="concat", **how):
    """Rounding apart: products of ONNX Runtime sum in another order than torch's, hence 3 times eager's error."""
    named = {"activation": activation, "layout": layout}
    eager = slot_by_slot(**case, **named).to(y.dtype)
    return within_budget(y, eager=eager, exact=slot_by_slot(**exact(case), **named), factor=3.0, **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "layout"), COMBINATIONS)
def test_agrees_with_the_slot_loop(dtype, activation, layout):
    """Biases, a token that names an expert twice, skipped slots, whatever their weight."""
    case = expert_case(24, bias=True, dtype=dtype)
    case["experts"][1, 2] = case["experts"][1, 0]
    case["experts"][2, 0], case["experts"][2, 2], case["weights"][2, 0] = -1, 12, torch.nan
    y = answer(whole(case, activation, layout), case)
    assert (verdict := judge(y, case, activation, layout)).ok, str(verdict)


@pytest.mark.parametrize("tokens", [0, 1, 5, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["body", "inlined", "onnx"])
def test_any_number_of_tokens_wherever_it_runs(how, dtype, tokens):
    case = expert_case(tokens if how != "onnx" else min(tokens, 40), num_experts=20, top_k=4, dtype=dtype)
    model = whole(case)
    onnx.checker.check_model(model, full_check=True)
    if how == "onnx":
        y = torch.from_numpy(np.asarray(ReferenceEvaluator(model).run(None, feeds(case))[0], np.float32)).to(dtype)
    else:
        y = answer(onnx.inliner.inline_local_functions(model) if how == "inlined" else model, case)
    assert y.shape == case["x"].shape
    assert (verdict := judge(y, case)).ok, str(verdict)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_shares_take_several_rounds(layout):
    """101 tokens with the same three of 12 experts: blocks hold 50 rows, so two experts take three rounds."""
    case = expert_case(101)
    case["experts"][:] = torch.tensor([7, 2, 11])
    case["experts"][:30, 1] = 5
    y = answer(whole(case, "silu", layout), case)
    assert (verdict := judge(y, case)).ok, str(verdict)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row(dtype):
    case = expert_case(12, dtype=dtype)
    runner = session(whole(case))
    (clean,) = runner.run(None, feeds(case))
    for name, bad in (("x", np.nan), ("x", np.inf), ("weights", np.nan)):
        inputs = {key: value.copy() for key, value in feeds(case).items()}
        inputs[name][5] = bad
        (y,) = runner.run(None, inputs)
        assert not np.isfinite(y[5]).any(), (name, bad)
        assert np.array_equal(np.delete(y, 5, 0), np.delete(clean, 5, 0)), (name, bad)


@pytest.mark.parametrize("activation", ["silu_clamped", "swiglu_oai", "relu", "relu2", "gelu", "gelu_tanh"])
def test_no_activation_hides_nan(activation):
    """A clamp or a maximum written carelessly turns NaN into a number."""
    case = expert_case(4)
    case["x"][2] = torch.nan
    y = answer(whole(case, activation), case)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


def test_weights_of_an_expert_without_tokens_are_not_read():
    case = expert_case(6)
    case["experts"].masked_fill_(case["experts"] == 5, 11)
    expected = answer(whole(case), case)
    case["gate_up"][5], case["down"][5] = torch.nan, torch.nan
    assert torch.equal(answer(whole(case), case), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_twenty_runs_give_the_same_bits(dtype):
    """With two threads; a scatter that adds did not (three runs of forty were wrong)."""
    case = expert_case(256, hidden=96, width=64, num_experts=63, top_k=7, dtype=dtype)
    runner = session(whole(case), threads=2)
    first, *others = (runner.run(None, feeds(case))[0] for _ in range(20))
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["zeros", "unwritten row", "misrouted", "dropped", "weights", "swapped"])
def test_planted_faults_are_caught(fault, dtype):
    """The judge of this file sees each of them, in every dtype."""
    case = expert_case(40, num_experts=20, top_k=4, dtype=dtype)
    broken = {key: None if value is None else value.clone() for key, value in case.items()}
    if fault == "misrouted":
        broken["experts"][3, 1] = (broken["experts"][3, 1] + 1) % 20
    elif fault == "dropped":
        broken["experts"][broken["experts"] == 4] = -1
    elif fault == "weights":
        broken["weights"] *= 1.02
    elif fault == "swapped":
        broken["gate_up"] = torch.cat(broken["gate_up"].chunk(2, 1)[::-1], 1)
    y = answer(whole(broken), broken)
    if fault == "zeros":
        y.zero_()
    elif fault == "unwritten row":
        y[17] = torch.nan
    assert judge(answer(whole(case), case), case).ok
    assert not judge(y, case).ok


def test_layers_that_differ_have_a_function_each():
    """By `overload`: ONNX Runtime before 1.27 takes the last of them for all nodes, and says nothing."""
    case = expert_case(9, bias=True)
    other = case | {"gate_up_bias": None, "down_bias": None}
    model, second = node_model(case, "silu"), node_model(other, "gelu")
    second.graph.node[1].input[0], second.graph.node[1].output[0] = "after", "last"
    model.graph.node.insert(2, second.graph.node[1])
    model.graph.node[3].input[0] = "last"
    add_functions(model)
    assert len(model.functions) == 2
    assert minimum_onnxruntime(model) == OVERLOADS_SINCE
    assert minimum_onnxruntime(whole(case)) != OVERLOADS_SINCE
    onnx.checker.check_model(model, full_check=True)
    middle = {key: slot_by_slot(**c, activation="silu") for key, c in (("eager", case), ("exact", exact(case)))}
    eager = slot_by_slot(**(other | {"x": middle["eager"]}), activation="gelu")
    wanted = slot_by_slot(**(exact(other) | {"x": middle["exact"]}), activation="gelu")
    if KNOWS_OVERLOADS:
        assert_within_budget(answer(model, case), eager=eager, exact=wanted)
    assert_within_budget(answer(onnx.inliner.inline_local_functions(model), case), eager=eager, exact=wanted)


def test_bodies_are_made_anew_not_twice():
    model = whole(expert_case(3))
    before = model.SerializeToString(deterministic=True)
    add_functions(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("opset", [21, 23, 25])
def test_opsets(opset):
    if opset > 23 and not KNOWS_OVERLOADS:
        pytest.skip("this ONNX Runtime ends at opset 23")
    case = expert_case(7)
    model = node_model(case, "gelu")
    model.opset_import[0].version = opset
    add_functions(model)
    assert model.functions[0].opset_import[0].version == opset
    assert (verdict := judge(answer(model, case), case, "gelu")).ok, str(verdict)


def test_what_has_no_body_is_refused():
    model = node_model(expert_case(3))
    model.opset_import[0].version = 17
    with pytest.raises(TargetError, match=r"opset 17.* needs 21"):
        add_functions(model)
    with pytest.raises(ConfigError, match="'swish'"):
        function("swish", 1.0, 0.0, "concat", biases=False, opset=23)
    with pytest.raises(ConfigError, match="one projection"):
        function("swiglu_oai", 1.0, 0.0, "ungated", biases=False, opset=23)


def test_the_schema_and_the_body_agree():
    """Registered or not, the checker and shape inference accept the function."""
    register_schema()
    model = whole(expert_case(3))
    onnx.checker.check_model(model, full_check=True)
    del model.functions[:]
    onnx.checker.check_model(model, full_check=True)
