"""dsmoe::experts through MLIR against float64, for every layout, activation, size and fault that the operator knows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch_mlir")

from dsmoe_runtime.agreement import assert_within_budget
from dsmoe_runtime.errors import InputError, TargetError
from dsmoe_runtime.mlir.experts import experts
from dsmoe_runtime.mlir.levels import LEVELS, cpu_flags
from tests.runtime.op_cases import COMBINATIONS, attributes, exact, expert_case, laid_out, run, slot_by_slot

pytestmark = pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2")


def compiled(case, activation="silu", layout="concat"):
    values = case | attributes(activation, layout)
    names = ("x", "experts", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
    return experts(*(values[name] for name in (*names, "activation", "alpha", "limit", "layout")))


def check(case, activation="silu", layout="concat"):
    """Within twice the error of the operator's rule in the same dtype; returns the result."""
    ready = laid_out(case, layout)
    y, eager = compiled(ready, activation, layout), run(ready, activation, layout)
    assert_within_budget(y, eager=eager, exact=slot_by_slot(**exact(case), activation=activation, layout=layout))
    return y


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("activation", "layout"), COMBINATIONS)
def test_every_activation_and_layout(dtype, activation, layout):
    check(expert_case(40, num_experts=8, bias=True, dtype=dtype), activation, layout)


@pytest.mark.parametrize("tokens", [0, 1, 7, 63, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_tokens_by_one_compiled_kernel(tokens, dtype):
    y = check(expert_case(tokens, dtype=dtype))
    assert y.shape == (tokens, 42)


@pytest.mark.parametrize("tokens", [*range(1, 36), 128, 129, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mixture_of_tiles(tokens, dtype):
    """One expert with each number of tokens: whole and filled panels, row tiles of one to three, and both."""
    check(expert_case(tokens, hidden=300, width=118, num_experts=1, top_k=1, dtype=dtype))


@pytest.mark.parametrize(
    ("hidden", "width", "num_experts", "top_k"),
    [(128, 853, 63, 7), (7, 5, 1, 1), (129, 65, 160, 1), (577, 96, 5, 5), (300, 112, 2, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes(hidden, width, num_experts, top_k, dtype):
    check(expert_case(50, hidden=hidden, width=width, num_experts=num_experts, top_k=top_k, dtype=dtype))


@pytest.mark.parametrize("bad", [-1, 12, 2**40, -(2**40)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_ids_outside_are_skipped(bad, tokens):
    case = expert_case(tokens)
    case["experts"][0, 1] = bad
    check(case)
    case["weights"][0, 1] = 0
    expected = compiled(case)
    case["weights"][0, 1] = torch.nan
    assert torch.equal(compiled(case), expected)
    case["experts"].fill_(bad)
    assert torch.equal(compiled(case), torch.zeros_like(case["x"]))


@pytest.mark.parametrize("tokens", [12, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row(tokens, dtype):
    case = expert_case(tokens, dtype=dtype)
    clean = compiled(case)
    for name, bad in (("x", torch.nan), ("x", torch.inf), ("x", 1e30), ("weights", torch.nan)):
        poisoned = case | {name: case[name].clone()}
        poisoned[name][4] = bad
        y = compiled(poisoned)
        assert torch.equal(y[:4], clean[:4])
        assert torch.equal(y[5:], clean[5:])
        if bad != bad:
            assert y[4].isnan().all()


@pytest.mark.parametrize("layout", ["concat", "concat_transposed"])
def test_weights_of_an_expert_without_tokens_are_not_read(layout):
    case = expert_case(30)
    case["experts"].masked_fill_(case["experts"] == 5, 11)
    expected = compiled(laid_out(case, layout), layout=layout)
    case["gate_up"][5], case["down"][5] = torch.nan, torch.nan
    assert torch.equal(compiled(laid_out(case, layout), layout=layout), expected)


@pytest.mark.parametrize("tokens", [1, 7, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_every_run_and_for_any_number_of_threads(tokens, dtype, two_threads):
    """What the workspace held before does not matter either. Threads once shared one scratch memory: with garbage in
    it, two of twenty runs came out wrong."""
    case = expert_case(tokens, dtype=dtype, bias=True)
    torch.set_num_threads(1)
    expected = compiled(case)
    torch.set_num_threads(2)
    for _ in range(20):
        assert torch.equal(compiled(case), expected)


def test_views_strides_and_int32_ids():
    case = expert_case(20)
    expected = compiled(case)
    wide = torch.randn(20, 3 * 42)
    wide[:, 42:84] = case["x"]
    assert torch.equal(compiled(case | {"x": wide[:, 42:84]}), expected)
    assert torch.equal(compiled(case | {"x": case["x"].T.contiguous().T}), expected)
    assert torch.equal(compiled(case | {"experts": case["experts"].int()}), expected)
    every_second = torch.stack((case["down"], torch.zeros_like(case["down"])), dim=1)[:, 0]
    assert not every_second.is_contiguous()
    assert torch.equal(compiled(case | {"down": every_second}), expected)


def test_a_huge_float32_reaches_no_bfloat16_as_nan():
    """Rounding to bfloat16 keeps infinities infinite and NaN quiet."""
    case = expert_case(3, dtype=torch.bfloat16)
    case["weights"][1] = 3e38
    y = compiled(case)
    assert not y[0].isnan().any()
    assert y[1].isinf().any()


def test_what_it_cannot_do_is_refused_by_name():
    with pytest.raises(TargetError, match="float64"):
        compiled(expert_case(3, dtype=torch.float64))
    with pytest.raises(InputError, match="must both be"):
        compiled(expert_case(3) | {"weights": torch.rand(3, 2)})
