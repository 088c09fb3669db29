"""The library's CPU kernel in ONNX Runtime against torch.ops.dsmoe.experts, on every shape and fault."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from dsmoe_runtime.agreement import assert_within_budget
from tests.runtime.op_cases import COMBINATIONS, attributes, exact, expert_case, laid_out, normal, run
from tests.runtime.ort_node import INPUTS, answer, model, opened, session

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ODD = {"num_experts": 63, "top_k": 7, "hidden": 80, "width": 53}


def check(case, activation="silu", layout="concat"):
    """Within twice the error of torch's rule in the same dtype, the same bits with one thread and two; the result."""
    placed = laid_out(case, layout)
    y = answer(opened(placed, activation, layout), placed)
    assert torch.equal(answer(opened(placed, activation, layout, threads=2), placed), y)
    exactly = run(laid_out(exact(case), layout), activation, layout)
    assert_within_budget(y, eager=run(placed, activation, layout), exact=exactly)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "layout"), COMBINATIONS)
def test_agrees_with_the_rule(dtype, activation, layout):
    for tokens in (1, 5, 63):
        y = check(expert_case(tokens, bias=tokens == 5, dtype=dtype, **ODD), activation, layout)
    assert 0.1 < y.float().square().mean().sqrt() < 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 6, 7, 9, 256])
def test_any_number_of_rows_for_an_expert(tokens, dtype):
    """With K = E every expert has T rows: each way in which rows are put together."""
    assert check(expert_case(tokens, num_experts=3, dtype=dtype)).shape == (tokens, 42)


@pytest.mark.parametrize("layout", ["concat", "interleaved_transposed"])
@pytest.mark.parametrize(("hidden", "width"), [(1, 1), (3, 2), (13, 8), (1024, 5), (2100, 1029)])
def test_any_width(hidden, width, layout):
    """Less than a vector, exactly one pass, and three passes with a rest."""
    check(expert_case(5, hidden=hidden, width=width, num_experts=4), layout=layout)


def test_more_slots_than_are_worked_on_at_a_time():
    check(expert_case(2100, num_experts=9, top_k=8, hidden=40, width=11))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_the_same_bits_alone_and_in_company(dtype):
    case = expert_case(40, dtype=dtype, hidden=1500, num_experts=4)
    ran = opened(case)
    together = answer(ran, case)
    rows = ("x", "experts", "weights")
    for t in range(0, 40, 7):
        assert torch.equal(answer(ran, case | {name: case[name][t : t + 1] for name in rows}), together[t : t + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_run_with_any_number_of_threads(dtype):
    case = expert_case(70, dtype=dtype)
    first = answer(opened(case), case)
    for threads in (1, 2, 3):
        ran = opened(case, threads=threads)
        assert all(torch.equal(answer(ran, case), first) for _ in range(20))


def test_runs_of_one_session_at_the_same_time():
    cases = [expert_case(30, seed=seed) for seed in range(4)]
    ran = opened(cases[0], threads=2)
    expected = [answer(ran, case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            assert all(map(torch.equal, pool.map(lambda case: answer(ran, case), cases), expected))


@pytest.mark.parametrize("bad", [-1, 12, 2**40, -(2**40)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_ids_outside_are_skipped(bad, tokens):
    case = expert_case(tokens)
    case["experts"][0, 1] = bad
    check(case)
    expected = answer(opened(case), case)
    case["weights"][0, 1] = torch.nan
    assert torch.equal(answer(opened(case), case), expected)
    case["experts"].fill_(bad)
    assert torch.equal(answer(opened(case), case), torch.zeros_like(case["x"]))


def test_weights_of_an_expert_without_tokens_are_not_read():
    case = expert_case(6)
    case["experts"].masked_fill_(case["experts"] == 5, 11)
    expected = answer(opened(case), case)
    case["gate_up"][5], case["down"][5] = torch.nan, torch.nan
    assert torch.equal(answer(opened(case), case), expected)


@pytest.mark.parametrize("layout", ["concat", "concat_transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype, layout):
    """Also in the last columns, behind which the next row or the next expert begins."""
    case = laid_out(expert_case(12, dtype=dtype), layout)
    ran = opened(case, layout=layout)
    clean = answer(ran, case)
    for name, bad in (("x", torch.nan), ("x", torch.inf), ("x", 1e4), ("weights", torch.nan)):
        poisoned = case | {name: case[name].clone()}
        poisoned[name][4, -1] = bad
        y = answer(ran, poisoned)
        assert torch.equal(y[:4], clean[:4])
        assert torch.equal(y[5:], clean[5:])
        assert bad == bad or y[4].isnan().all()
    hit = (case["experts"] == 3).any(dim=1)
    case["gate_up"][3, -1, -1] = torch.nan
    y = answer(ran, case)
    assert y[hit].isnan().all()
    assert torch.equal(y[~hit], clean[~hit])


@pytest.mark.parametrize("activation", ["silu", "swiglu_oai", "silu_clamped", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations_of_every_size(activation):
    """One column: y is the activation of x itself, from where exp overflows to where it vanishes, NaN and Inf."""
    sizes = torch.logspace(-8, 4, 400).repeat(2)
    x = torch.cat((sizes * torch.tensor([1.0, -1.0]).repeat_interleave(400), torch.tensor([0, torch.nan, torch.inf])))
    case = expert_case(len(x), hidden=1, width=1, num_experts=1, top_k=1)
    case |= {"x": x[:, None], "gate_up": torch.ones(1, 2, 1), "down": torch.ones(1, 1, 1)}
    case["weights"] = torch.ones(len(x), 1)
    y, eager, exactly = answer(opened(case, activation), case), run(case, activation), run(exact(case), activation)
    judged = (exactly.isfinite() & (exactly.abs() > 1e-12))[:, 0]
    assert judged.sum() > 250
    assert_within_budget(y[judged], eager=eager[judged], exact=exactly[judged], factor=4)
    assert torch.allclose(y[~judged].double(), exactly[~judged], rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 1 / 3, -1 / 3, -40000.0])
def test_every_half_is_read_and_rounded_as_torch_does(dtype, factor):
    """All 65,536 of them through one column: subnormal, Inf and NaN included."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None]
    one = torch.ones(1, 1, 1, dtype=dtype)
    case = {"x": x, "experts": torch.zeros(2**16, 1, dtype=torch.int64), "gate_up": one, "down": one}
    case |= {"weights": torch.full((2**16, 1), factor), "gate_up_bias": None, "down_bias": None}
    y = answer(opened(case, "relu", "ungated"), case)
    assert torch.allclose(y, (x.float().relu() * torch.tensor(factor)).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tokens", [1, 6])
def test_sums_near_the_end_of_float16(tokens):
    """Three answers of 40,000 and weights of 1, 1, -1 sum to 40,000; in float16 the first two overflow."""
    case = expert_case(tokens, num_experts=3, hidden=8, width=4, dtype=torch.float16)
    case["x"].fill_(1)
    case["gate_up"].fill_(0)
    case["gate_up"][..., 0] = 4.0
    case["experts"] = torch.tensor([[0, 1, 2]]).expand(tokens, 3)
    case["weights"] = torch.tensor([[1.0, 1.0, -1.0]]).expand(tokens, 3)
    case["down"].fill_(40000 / 4 / (16 / (1 + torch.tensor(-4.0).exp())).item())
    assert (answer(opened(case), case).float() - 40000).abs().max() < 40


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({"x": normal(7, 41, seed=0)}, "concat", r"gate_up is \[12, 54, 42\]; x \[7, 41\] and layout 'concat' want"),
        ({"x": normal(2, 7, 42, seed=0)}, "concat", r"x is \[2, 7, 42\]; it must have 2 dimensions"),
        ({"x": normal(8, 42, seed=0)}, "concat", r"experts is \[7, 3\]; x \[8, 42\] want \[8, 3\]"),
        ({"weights": normal(7, 2, seed=0)}, "concat", r"weights is \[7, 2\]; .* want \[7, 3\]"),
        ({"down": normal(12, 42, 28, seed=0)}, "concat", r"down is \[12, 42, 28\]; .* want \[12, 42, 27\]"),
        ({"down": normal(11, 42, 27, seed=0)}, "concat", r"down is \[11, 42, 27\]; .* want \[12, 42, 27\]"),
        ({"down": normal(12, 42, seed=0)}, "concat", r"down is \[12, 42\]; it must have 3 dimensions"),
        ({"gate_up": normal(12, 55, 42, seed=0)}, "concat", r"gate_up is \[12, 55, 42\]; .* want \[12, 54, 42\]"),
        ({"gate_up_bias": normal(12, 53, seed=0)}, "concat", r"gate_up_bias is \[12, 53\]; .* want \[12, 54\]"),
        ({"down_bias": normal(12, seed=0)}, "concat", r"down_bias is \[12\]; .* want \[12, 42\]"),
        ({}, "concat_transposed", r"gate_up is \[12, 54, 42\]; .*'concat_transposed' want"),
        ({}, "ungated", r"down is \[12, 42, 27\]; .* 'ungated' want \[12, 42, 54\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(changes, layout, message):
    case = expert_case(bias=True) | changes
    ran = opened(case, layout=layout)
    with pytest.raises(Exception, match=f"dsmoe::DsMoE: {message}"):
        answer(ran, case)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "mish"}, "activation is 'mish'; it must be one of silu, silu_clamped"),
        ({"layout": "packed"}, "layout is 'packed'; it must be one of concat"),
        ({"activation": "swiglu_oai", "layout": "ungated"}, "'swiglu_oai', which wants gate and up"),
        ({"alpha": 1}, "attribute alpha must be a float"),
        ({"limit": "seven"}, "attribute limit must be a float"),
        ({"layout": 1}, "attribute layout must be a string"),
    ],
)
def test_attributes_that_do_not_exist_are_refused_when_the_session_is_made(changes, message):
    with pytest.raises(Exception, match=message):
        session(model(INPUTS[:5], torch.float32, attributes() | changes))


def test_absent_attributes_have_the_defaults_of_the_specification():
    case = expert_case()
    expected = answer(opened(case), case)
    assert torch.equal(answer(session(model(INPUTS[:5], torch.float32, {})), case), expected)


def test_down_bias_alone():
    case = expert_case(bias=True) | {"gate_up_bias": None}
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "avx2", "avx512"])
def test_on_each_kind_of_processor(name):
    """The arithmetic that this processor would not choose; what it cannot run says so."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        __file__,
        "-k",
        "agrees or any_ or bits or nan or half or every",
    ]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, cwd=root, env=os.environ | {"DSMOE_CPU": name}, capture_output=True, text=True)
    if f"DSMOE_CPU is '{name}'; this processor runs " in ran.stdout:
        pytest.skip(f"this processor has no {name}")
    assert ran.returncode == 0, ran.stdout[-3000:]
