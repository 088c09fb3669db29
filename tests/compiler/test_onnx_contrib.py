"""DsMoE as ONNX Runtime's own MoE: right where it is written, refused elsewhere, and whether the reasons still hold."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.parser import parse_model

from dsmoe_compiler.targets.onnx.contrib import CPU, CUDA, lower_to_contrib
from dsmoe_compiler.targets.onnx.function import add_functions
from dsmoe_runtime.agreement import assert_within_budget
from dsmoe_runtime.errors import TargetError
from tests.compiler.onnx_nodes import INSTALLED, NAMES, WEIGHTS, array, initializers, session, skip_without_tokens
from tests.runtime.op_cases import ALPHA, LIMIT, exact, expert_case, laid_out, normal, slot_by_slot

FIXED = (1, 32)  # the first version of onnxruntime whose CPU MoE has neither of the two faults below
RIGHT = [
    *((name, layout) for name in ("silu", "silu_clamped", "swiglu_oai") for layout in ("concat", "interleaved")),
    ("silu", "ungated"), ("relu", "ungated"),
]  # fmt: skip


def chain(case, activation="silu", layout="concat", experts="chosen"):
    """Mul -> DsMoE -> Mul, routed by a TopK: the graph in which the CPU's MoE was wrong."""
    kind = NAMES[case["x"].dtype]
    names = ", ".join(name for name in WEIGHTS if case[name] is not None)
    model = parse_model(
        f"""<ir_version: 10, opset_import: ["" : 23, "dsmoe" : 1]>
        layer ({kind}[T, H] x, float[T, E] scores, int64[T, K] given) => ({kind}[T, H] y)
        <{kind} two = {{2}}, int64[1] k = {{3}}> {{
            weights, chosen = TopK(scores, k)
            doubled = Mul(x, two)
            answer = dsmoe.DsMoE<activation = "{activation}", alpha = {ALPHA}, limit = {LIMIT}, layout = "{layout}">(
                doubled, {experts}, weights, {names})
            y = Mul(answer, two)
        }}"""
    )
    initializers(model, case)
    return model


def run(model, case, scores, threads=1):
    inputs = {"x": array(case["x"] / 2), "scores": scores.numpy(), "given": np.zeros((len(scores), 3), np.int64)}
    return torch.from_numpy(session(model, threads=threads).run(None, inputs)[0])


@pytest.mark.parametrize("tokens", [0, 1, 5, 64])
@pytest.mark.parametrize(("activation", "layout"), RIGHT)
@pytest.mark.parametrize("threads", [1, 2])
def test_right_in_a_chain_on_the_cpu(activation, layout, tokens, threads):
    """Any weights: these are neither a softmax nor do they sum to one."""
    skip_without_tokens(tokens)
    case = expert_case(tokens, bias=True)
    scores = 3 * normal(tokens, 12, seed=3).abs()
    model = chain(laid_out(case, layout), activation, layout)
    add_functions(model)
    lowered = lower_to_contrib(model, CPU)
    onnx.checker.check_model(lowered)
    assert [node.op_type for node in lowered.graph.node].count("MoE") == 1
    assert {entry.domain for entry in lowered.opset_import} == {"", "com.microsoft"}
    assert not lowered.functions
    weights, chosen = scores.topk(3)
    routed = case | {"experts": chosen, "weights": weights}
    named = {"activation": activation, "layout": layout}
    eager, wanted = 2 * slot_by_slot(**routed, **named), 2 * slot_by_slot(**exact(routed), **named)
    assert_within_budget(run(lowered, case, scores, threads), eager=eager, exact=wanted)


def test_interleaved_weights_are_computed_when_the_session_starts(tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    lowered = lower_to_contrib(chain(expert_case(3, bias=True)), CPU)
    assert "Transpose" in {node.op_type for node in lowered.graph.node}
    onnxruntime.InferenceSession(lowered.SerializeToString(), options, providers=[CPU])
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "MoE" in left
    assert not left & {"Transpose", "Reshape"}


def test_a_token_without_weight_gets_zero_and_nan_stays_nan():
    case = expert_case(4)
    scores = normal(4, 12, seed=3).abs()
    scores[1], scores[2] = 0, torch.nan
    y = run(lower_to_contrib(chain(case), CPU), case, scores)
    assert not y[1].any()
    assert y[2].isnan().all()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("layout", ["concat", "interleaved", "ungated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_takes_three_types_and_gate_and_up_interleaved(dtype, layout):
    case = laid_out(expert_case(3, hidden=48, width=32, bias=True, dtype=dtype), layout)
    lowered = lower_to_contrib(chain(case, "silu", layout), CUDA)
    onnx.checker.check_model(lowered)
    (moe,) = (node for node in lowered.graph.node if node.op_type == "MoE")
    said = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in moe.attribute}
    assert said["k"] == 3
    assert said.get("swiglu_fusion") == {"concat": 1, "interleaved": 1, "ungated": None}[layout]
    if layout != "concat":
        assert list(moe.input)[2:] == ["gate_up", "gate_up_bias", "down", "down_bias"]
    assert "Where" not in {node.op_type for node in lowered.graph.node}


@pytest.mark.parametrize(
    ("changes", "provider", "message"),
    [
        ({"dtype": torch.float16}, CPU, "are float16.* float32 only .before onnxruntime 1.32 float16 gives zeros"),
        ({"dtype": torch.bfloat16}, CPU, "weights are bfloat16, and there it is right in float32 only"),
        ({"layout": "concat_transposed"}, CUDA, "'concat_transposed' has the rows"),
        ({"activation": "gelu"}, CUDA, "'gelu' behind a gate; it has silu, silu_clamped, swiglu_oai"),
        ({"activation": "relu2", "layout": "ungated"}, CPU, "'relu2' without a gate; it has silu, relu"),
        ({"experts": "given"}, CPU, "not what a TopK gives, so one may come twice"),
        ({"dtype": torch.bfloat16}, CUDA, r"down is \[12, 42, 27\]; H and I must be multiples of 8"),
        ({}, "DmlExecutionProvider", "not on DmlExecutionProvider"),
    ],
)  # fmt: skip
def test_what_it_would_compute_wrong_is_refused(changes, provider, message):
    how = {"activation": "silu", "layout": "concat", "experts": "chosen", "dtype": torch.float32} | changes
    case = laid_out(expert_case(3, dtype=how.pop("dtype")), how["layout"])
    model = chain(case, **how)
    with pytest.raises(TargetError, match=message) as refusal:
        lower_to_contrib(model, provider)
    assert provider not in (CPU, CUDA) or "use the profile portable" in str(refusal.value)


def test_weights_that_the_graph_computes_are_refused():
    model = chain(expert_case(3))
    model.graph.initializer[2].name = "raw"
    model.graph.node.insert(0, onnx.helper.make_node("Identity", ["raw"], ["gate_up"]))
    with pytest.raises(TargetError, match="'gate_up' is computed in the graph"):
        lower_to_contrib(model, CPU)


def test_canary_an_input_that_nothing_reads_afterwards_is_overwritten():
    """Before 1.32. The Where after each MoE, and this canary, may go once 1.31 is no longer supported."""
    case, scores = expert_case(16), normal(16, 12, seed=3).abs()
    lowered = lower_to_contrib(chain(case), CPU)
    right = run(lowered, case, scores)
    (guard,) = (node for node in lowered.graph.node if node.op_type == "Where")
    for node in lowered.graph.node:
        node.input[:] = [guard.input[1] if name == guard.output[0] else name for name in node.input]
    lowered.graph.node.remove(guard)
    off = (run(lowered, case, scores) - right).abs().max()
    assert (off > 0.1) == (INSTALLED < FIXED)


def test_canary_float16_on_the_cpu_is_all_zeros():
    """Before 1.32. Float16 may be written for a CPU once 1.31 is no longer supported."""
    case, scores = expert_case(5), normal(5, 12, seed=3).abs()
    lowered = lower_to_contrib(chain(case), CPU)
    wide = run(lowered, case, scores)
    half = laid_out(expert_case(5, dtype=torch.float16), "interleaved")
    (moe,) = (node for node in lowered.graph.node if node.op_type == "MoE")
    model = parse_model(
        """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        layer (float16[T, H] x, float16[T, E] row) => (float16[T, H] y) { y = Neg(x) }"""
    )
    moe.input[:] = ["x", "row", "gate_up", "", "down"]
    moe.output[:] = ["y"]
    model.graph.node[0].CopyFrom(moe)
    model.graph.initializer.extend(numpy_helper.from_array(array(half[name]), name) for name in ("gate_up", "down"))
    row = np.float16(scores.numpy())
    (y,) = session(model).run(None, {"x": array(half["x"]), "row": row})
    assert wide.abs().max() > 0.1
    assert (np.abs(y).max() == 0) == (INSTALLED < FIXED)
