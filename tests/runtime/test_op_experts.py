"""dsmoe::experts against a loop over slots, on every shape, stride and fault that users meet."""

from __future__ import annotations

import pytest
import torch

from dsmoe_runtime.agreement import assert_within_budget
from dsmoe_runtime.errors import ConfigError, InputError
from tests.runtime.op_cases import (
    COMBINATIONS,
    attributes,
    exact,
    expert_case,
    laid_out,
    normal,
    run,
    slot_by_slot,
)


def check(case, activation="silu", layout="concat"):
    """Within twice the error of the slot loop in the same dtype; returns the result."""
    y = run(laid_out(case, layout), activation, layout)
    eager = slot_by_slot(**case, activation=activation, layout=layout).to(y.dtype)
    assert_within_budget(y, eager=eager, exact=slot_by_slot(**exact(case), activation=activation, layout=layout))
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("activation", "layout"), COMBINATIONS)
def test_agrees_with_the_slot_loop(dtype, activation, layout):
    case = expert_case(20, num_experts=8, bias=True, dtype=dtype)
    y = check(case, activation, layout)
    assert 0.1 < y.float().square().mean().sqrt() < 10
    assert y.dtype == dtype


@pytest.mark.parametrize("tokens", [0, 1, 2, 4, 5, 16, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_tokens(tokens, dtype):
    """Rows 1 and 2: none, one, and both sides of each change of method (an expert then has 1, 2, 4, 5, ... rows)."""
    y = check(expert_case(tokens, num_experts=4, top_k=4, dtype=dtype))
    assert y.shape == (tokens, 42)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (3, 3), (160, 1), (160, 16)])
def test_any_number_of_experts(num_experts, top_k):
    """Rows 3 and 15: one expert, all experts, and 160 of them."""
    check(expert_case(9, num_experts=num_experts, top_k=top_k))


@pytest.mark.parametrize(("hidden", "width"), [(1, 1), (7, 5), (129, 65)])
def test_odd_sizes(hidden, width):
    check(expert_case(11, hidden=hidden, width=width, dtype=torch.bfloat16))


def test_weights_of_an_expert_without_tokens_are_not_read():
    """Row 3: NaN there reaches nothing."""
    case = expert_case(6)
    case["experts"].masked_fill_(case["experts"] == 5, 11)
    expected = run(case)
    case["gate_up"][5], case["down"][5] = torch.nan, torch.nan
    assert torch.equal(run(case), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_to_one_expert(dtype):
    """Row 4, with one expert three times in a row as well."""
    case = expert_case(33, dtype=dtype)
    case["experts"].fill_(7)
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row(dtype):
    """Rows 6, 8 and 9: NaN, Inf or garbage in a token or its weights leaves every other row as it was, to the bit."""
    case = expert_case(12, dtype=dtype)
    clean = run(case)
    for name, bad in (("x", torch.nan), ("x", torch.inf), ("x", 1e30), ("weights", torch.nan)):
        poisoned = case | {name: case[name].clone()}
        poisoned[name][4] = bad
        y = run(poisoned)
        assert torch.equal(y[:4], clean[:4])
        assert torch.equal(y[5:], clean[5:])
        if bad != bad:
            assert y[4].isnan().all()


def test_nan_in_an_expert_reaches_its_tokens_only():
    case = expert_case(12)
    clean = run(case)
    case["gate_up"][3, 0, 0] = torch.nan
    y = run(case)
    hit = (case["experts"] == 3).any(dim=1)
    assert hit.any()
    assert y[hit].isnan().all()
    assert torch.equal(y[~hit], clean[~hit])


@pytest.mark.parametrize("bad", [-1, 12, 2**40, -(2**40)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_ids_outside_are_skipped(bad, tokens):
    """Row 10: the slot counts for nothing, even if its weight is NaN; the token's other slots do."""
    case = expert_case(tokens)
    case["experts"][0, 1] = bad
    check(case)
    case["weights"][0, 1] = 0
    expected = run(case)
    case["weights"][0, 1] = torch.nan
    assert torch.equal(run(case), expected)
    case["experts"].fill_(bad)
    assert torch.equal(run(case), torch.zeros_like(case["x"]))


def test_int32_ids():
    case = expert_case(9)
    assert torch.equal(run(case | {"experts": case["experts"].int()}), run(case))


def strided(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in other memory."""
    if how == "transposed":
        return tensor.mT.contiguous().mT
    if how == "sliced":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
        wide[..., 1 : 1 + 2 * tensor.shape[-1] : 2] = tensor
        return wide[..., 1 : 1 + 2 * tensor.shape[-1] : 2]
    storage = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    return storage[1:].view_as(tensor).copy_(tensor)  # misaligned


@pytest.mark.parametrize("how", ["transposed", "sliced", "misaligned"])
@pytest.mark.parametrize("layout", ["concat", "interleaved_transposed"])
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(how, layout, tokens, dtype):
    """Row 13."""
    case = expert_case(tokens, bias=True, dtype=dtype, num_experts=4)
    eager = slot_by_slot(**case, activation="silu").to(dtype)
    expected = slot_by_slot(**exact(case), activation="silu")
    case = laid_out(case, layout)
    for name in ("x", "weights", "gate_up", "down"):
        case[name] = strided(case[name], how)
    assert_within_budget(run(case, layout=layout), eager=eager, exact=expected)


@pytest.mark.parametrize("tokens", [1, 8])
def test_zero_strides(tokens):
    """Row 13: one row for all tokens, one expert for all experts, one weight for all slots."""
    case = expert_case(tokens)
    case["x"] = case["x"][:1].expand(tokens, -1)
    case["gate_up"], case["down"] = case["gate_up"][:1].expand(12, -1, -1), case["down"][:1].expand(12, -1, -1)
    case["weights"] = case["weights"][:1, :1].expand(tokens, 3)
    case["experts"] = case["experts"][:1].expand(tokens, -1)
    y = check(case)
    assert torch.equal(y, y[:1].expand_as(y))


@pytest.mark.parametrize("tokens", [1, 6])
def test_sums_near_the_end_of_float16(tokens):
    """Row 14: three answers of 40,000 and weights of 1, 1, -1 sum to 40,000; in float16 the first two overflow."""
    case = expert_case(tokens, num_experts=3, hidden=8, width=4, dtype=torch.float16)
    case["x"].fill_(1)
    case["gate_up"].fill_(0)
    case["gate_up"][..., 0] = 4.0
    case["experts"] = torch.tensor([[0, 1, 2]]).expand(tokens, 3)
    case["weights"] = torch.tensor([[1.0, 1.0, -1.0]]).expand(tokens, 3)
    hidden = 4 * 4 / (1 + torch.tensor(-4.0).exp())
    case["down"].fill_(40000 / 4 / hidden.item())
    y = run(case)
    assert (y.float() - 40000).abs().max() < 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 50])
def test_same_bits_on_every_run(dtype, tokens):
    """Row 21 as far as it goes here: 20 repeats, in fresh memory."""
    case = expert_case(tokens, dtype=dtype)
    first = run(case)
    assert all(
        torch.equal(run({k: None if v is None else v.clone() for k, v in case.items()}), first) for _ in range(20)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permuted_tokens_give_permuted_rows(dtype):
    """Metamorphic: an expert meets its rows in another order; within the budget: no batch invariance is claimed."""
    case = expert_case(30, dtype=dtype)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    permuted = case | {name: case[name][order] for name in ("x", "experts", "weights")}
    expected = slot_by_slot(**exact(case), activation="silu")[order]
    assert_within_budget(run(permuted), eager=run(case)[order], exact=expected)


def test_permuted_experts_give_the_same_rows():
    """Metamorphic, within the budget: where a matrix lies in memory may decide its last bit."""
    case = expert_case(30)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    renamed = case | {"experts": order.argsort()[case["experts"]]}
    renamed |= {name: case[name][order] for name in ("gate_up", "down")}
    assert_within_budget(run(renamed), eager=run(case), exact=slot_by_slot(**exact(case), activation="silu"))


def test_permuted_slots_give_the_same_rows():
    case = expert_case(30)
    turned = case | {name: case[name].flip(1) for name in ("experts", "weights")}
    assert_within_budget(run(turned), eager=run(case), exact=slot_by_slot(**exact(case), activation="silu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_duplicated_tokens_give_equal_rows_and_a_split_batch_the_same(dtype):
    """Row 22: alone, twice or with others, within the budget."""
    case = expert_case(24, dtype=dtype)
    expected = slot_by_slot(**exact(case), activation="silu")
    eager = slot_by_slot(**case, activation="silu").to(dtype)
    rows = ("x", "experts", "weights")
    doubled = run(case | {name: torch.cat((case[name], case[name])) for name in rows})
    for half in doubled.chunk(2):
        assert_within_budget(half, eager=eager, exact=expected)
    parts = [run(case | {name: case[name][part] for name in rows}) for part in (slice(0, 1), slice(1, 9), slice(9, 24))]
    assert_within_budget(torch.cat(parts), eager=eager, exact=expected)


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_output_is_new_memory_and_inputs_stay(tokens):
    """Row 20: x is read again by the shared experts; order of use must not matter."""
    case = expert_case(tokens, bias=True)
    before = {name: tensor.clone() for name, tensor in case.items()}
    y = run(case)
    y.fill_(7)
    assert all(torch.equal(case[name], before[name]) for name in case)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation": "mish"}, ConfigError, "activation is 'mish'; it must be one of silu"),
        (
            {"activation": "swiglu_oai", "layout": "ungated"},
            ConfigError,
            "'swiglu_oai', which wants gate and up, and layout 'ungated' has one projection; .* one of silu, gelu",
        ),
        ({"layout": "ungated"}, InputError, r"down is \(12, 42, 27\); gate_up .* 'ungated' want \(12, 42, 54\)"),
        ({"layout": "ungated_transposed"}, InputError, r"gate_up is \(12, 54, 42\).*'ungated_transposed'"),
        (
            {"layout": "ungated", "down": normal(12, 42, 54, seed=0), "gate_up_bias": normal(12, 27, seed=0)},
            InputError,
            r"gate_up_bias is \(12, 27\); gate_up and layout 'ungated' want \(12, 54\)",
        ),
        ({"layout": "packed"}, ConfigError, "layout is 'packed'; it must be one of concat"),
        ({"x": normal(7, 41, seed=0)}, InputError, r"gate_up is \(12, 54, 42\); x \(7, 41\)"),
        ({"layout": "concat_transposed"}, InputError, r"gate_up is \(12, 54, 42\).*'concat_transposed'"),
        ({"down": normal(12, 42, 28, seed=0)}, InputError, r"down is \(12, 42, 28\).*\(12, 42, 27\)"),
        ({"down": normal(11, 42, 27, seed=0)}, InputError, r"down is \(11, 42, 27\).*\(12, 42, 27\)"),
        ({"gate_up_bias": normal(12, 53, seed=0)}, InputError, r"gate_up_bias is \(12, 53\).*\(12, 54\)"),
        ({"down_bias": normal(12, 43, seed=0)}, InputError, r"down_bias is \(12, 43\).*\(12, 42\)"),
        ({"weights": normal(7, 2, seed=0)}, InputError, r"experts \(7, 3\) and weights \(7, 2\)"),
        ({"x": normal(8, 42, seed=0)}, InputError, r"experts \(7, 3\).*x \(8, 42\)"),
        ({"x": normal(2, 7, 42, seed=0)}, InputError, "not 3, 3, 3"),
        ({"weights": torch.ones(7, 3, dtype=torch.int64)}, InputError, "torch.int64, torch.int64"),
        ({"experts": torch.zeros(7, 3)}, InputError, "torch.float32, torch.float32"),
        # Row 18: both dtypes, both devices, in one line
        ({"x": normal(7, 42, seed=0).half()}, InputError, "gate_up is torch.float32 on cpu, x is torch.float16 on cpu"),
        (
            {"down": normal(12, 42, 27, seed=0).bfloat16()},
            InputError,
            "down is torch.bfloat16 on cpu, x is torch.float32",
        ),
        ({"down": torch.zeros(12, 42, 27, device="meta")}, InputError, "down is torch.float32 on meta, x is .* on cpu"),
        ({"experts": torch.zeros(7, 3, dtype=torch.int64, device="meta")}, InputError, "x is on cpu, experts on meta"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(changes, error, message):
    """Rows 17 and 18; also on the way to the kernels of a GPU, which would read beyond what is too small."""
    call = expert_case() | attributes() | changes
    with pytest.raises(error, match=message) as caught:
        torch.ops.dsmoe.experts(**call)
    assert isinstance(caught.value, ValueError)
    for operator in (torch.ops.dsmoe.experts, torch.ops.dsmoe.experts_training):
        with pytest.raises(error, match=message):
            operator.default._op_dk(torch._C.DispatchKey.CUDA, **call)
    assert "\n" not in str(caught.value)
