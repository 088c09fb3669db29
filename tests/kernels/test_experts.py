"""The experts' kernels against the rule, regime by regime: layouts, activations, biases, sizes, strides, faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsmoe_runtime.kernels import experts as kernels
from dsmoe_runtime.ops.mlp import mlp
from tests.kernels.cases import IN_INTERPRETER, PLANS, SORTED, case_of, check, run, verdict
from tests.runtime.op_cases import ALPHA, COMBINATIONS, LIMIT, normal, weight

pytestmark = pytest.mark.usefixtures("poison")

REGIMES = ("pairs", "scan", "sorted")
# Layouts with activations; the other properties go round, so that each regime meets every pair of values. What the
# oracle has runs in each regime, the others in one: activations are the same function in all.
ROUND = [
    (plan, layout, activation, (i // 2 + i) % 2 == 1, (3, 2, 1, 4)[(i + i // 4) % 4], ("even", "odd", "odd")[i % 3])
    for i, (activation, layout) in enumerate(COMBINATIONS)
    for plan in (REGIMES if i < 12 else (REGIMES[i % 3],))
]


def few(tokens: int, plan: str) -> int:
    """So many, or as many as an interpreter can do in time where every pair of token and expert has its programs."""
    return min(tokens, 4) if plan.startswith("pairs") else tokens


@IN_INTERPRETER
@pytest.mark.parametrize(("plan", "layout", "activation", "bias", "tokens", "sizes"), ROUND)
def test_every_layout_activation_and_bias(device, plan, layout, activation, bias, tokens, sizes):
    tokens = few(tokens, plan)
    case = case_of(tokens, sizes, layout=layout, bias=bias)
    y = check(device, case, PLANS[plan], activation, layout)
    assert 0.1 < y.square().mean().sqrt() < 10


COUNTS = {"pairs": (0, 1), "scan": (0, 20), "sorted": (0, 1, 20), "sorted, half height": (20,)}


@IN_INTERPRETER
@pytest.mark.parametrize("plan", PLANS)
def test_any_number_of_tokens(device, plan):
    for tokens in COUNTS.get(plan, (4,)):
        assert check(device, case_of(tokens, "odd", bias=True), PLANS[plan]).shape == (tokens, 33)


@IN_INTERPRETER
@pytest.mark.parametrize("plan", ["pairs", "scan", "sorted"])
@pytest.mark.parametrize("sizes", ["one expert", "many experts"])
def test_any_number_of_experts(device, plan, sizes):
    check(device, case_of(3, sizes, skip=False), PLANS[plan])


@IN_INTERPRETER
@pytest.mark.parametrize("plan", PLANS)
def test_all_tokens_on_one_expert(device, plan):
    """More rows than a tile, also by one expert several times in a row; the others have none."""
    case = case_of(few(20, plan), skip=False)
    case["experts"].fill_(3)
    check(device, case, PLANS[plan])
    case["experts"].fill_(-1)
    assert not run(device, case, PLANS[plan]).any()


@IN_INTERPRETER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("plan", "layout", "activation"),
    [
        ("pairs", "concat", "silu"),
        ("scan", "interleaved", "swiglu_oai"),
        ("sorted", "concat_transposed", "silu_clamped"),
        ("sorted, half height", "concat", "silu"),
        ("scan", "ungated", "relu2"),
        ("sorted", "concat", "gelu_tanh"),
    ],
)
def test_half_precision(device, dtype, plan, layout, activation):
    case = case_of(few(7, plan), layout=layout, bias=True, dtype=dtype)
    assert check(device, case, PLANS[plan], activation, layout).dtype == dtype


def strided(case: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The same inputs otherwise in memory, or in another dtype, and by which plan to take them."""
    gaps = torch.full((len(case["x"]), 57), torch.nan)
    gaps[:, 3:43] = case["x"]
    wide = torch.full((5, 60, 40), torch.nan)
    wide[:, :48] = case["gate_up"]
    turned = {name: case[name].mT.contiguous().mT for name in ("x", "experts", "weights", "down")}
    beyond = {"experts": case["experts"].where(case["experts"] != -1, 2**32 + 1)}
    return {
        "pairs": [{"x": gaps[:, 3:43]} | beyond, turned],
        "scan": [turned | beyond, {"gate_up": wide[:, :48], "experts": case["experts"].int()}],
        "sorted": [
            turned | {"gate_up": wide[:, :48]},
            {"x": gaps[:, 3:43], "weights": case["weights"].bfloat16()} | beyond,
        ],
    }


@IN_INTERPRETER
@pytest.mark.parametrize("plan", ["pairs", "scan", "sorted"])
def test_strides_and_dtypes_of_any_kind(device, plan):
    """x and weights with gaps or transposed, ids in int32 or beyond 32 bits, routing weights in half precision."""
    case = case_of(3, bias=True)
    for changes in strided(case)[plan]:
        check(device, case | changes, PLANS[plan])


def shared_experts(x, gate_up, down, activation="silu", gated=True):
    """The shared experts' answer `[T, H]`, by the rule."""
    attributes = (activation, ALPHA, LIMIT, False, gated)
    return mlp(x, gate_up.to(x.dtype), down.to(x.dtype), None, None, *attributes)


@IN_INTERPRETER
@pytest.mark.parametrize(("tokens", "n_shared"), [(1, 3), (3, 1)])
@pytest.mark.parametrize("plan", ["pairs", "pairs, a block of the width at a time", "scan"])
def test_shared_experts_in_the_same_launches(device, plan, n_shared, tokens):
    """Slices as wide as a routed expert; the biases are the routed experts' alone."""
    case = case_of(tokens, "odd", bias=n_shared == 1)
    shared = weight(2 * n_shared * 19, 33, seed=40), weight(33, n_shared * 19, seed=41)
    actual = run(device, case, PLANS[plan], "swiglu_oai", shared=(*shared, n_shared))
    wanted = {"added": lambda c: shared_experts(c["x"], *shared, "swiglu_oai")}
    found = verdict(actual, case, "swiglu_oai", **wanted)
    assert found.ok, str(found)
    if n_shared == 1:
        return
    swapped = torch.cat(shared[0].chunk(2)[::-1]), shared[1]  # a planted fault
    actual = run(device, case, PLANS[plan], "swiglu_oai", shared=(*swapped, n_shared))
    assert not verdict(actual, case, "swiglu_oai", **wanted).ok


@IN_INTERPRETER
@pytest.mark.parametrize("plan", ["pairs", "scan"])
def test_shared_experts_without_a_gate(device, plan):
    case = case_of(2, "odd", layout="ungated", bias=True)
    shared = weight(2 * 19, 33, seed=40), weight(33, 2 * 19, seed=41)
    actual = run(device, case, PLANS[plan], "relu2", "ungated", shared=(*shared, 2))
    wanted = {"added": lambda c: shared_experts(c["x"], *shared, "relu2", gated=False)}
    found = verdict(actual, case, "relu2", "ungated", **wanted)
    assert found.ok, str(found)
    wanted = {"added": lambda c: shared_experts(c["x"], shared[0].flip(0), shared[1], "relu2", gated=False)}
    assert not verdict(actual, case, "relu2", "ungated", **wanted).ok


@IN_INTERPRETER
@pytest.mark.parametrize("plan", ["pairs", "scan", "sorted"])
def test_an_answer_that_was_computed_elsewhere_is_added(device, plan):
    case, extra = case_of(3), normal(3, 40, seed=50)
    actual = run(device, case, PLANS[plan], extra=extra)
    found = verdict(actual, case, added=lambda c: extra.to(c["x"].dtype))
    assert found.ok, str(found)
    assert extra.equal(normal(3, 40, seed=50))


@IN_INTERPRETER
@pytest.mark.parametrize(
    ("activation", "layout"), [("silu_clamped", "concat"), ("swiglu_oai", "concat"), ("relu2", "ungated")]
)
def test_nan_stays_in_its_row(device, activation, layout):
    """No limit takes it for a large number, as the smaller of NaN and 7 is 7 to a GPU unless it is told otherwise."""
    case = case_of(3, layout=layout, skip=False)
    case["x"][1] = torch.nan
    y = run(device, case, PLANS["scan"], activation, layout)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


@IN_INTERPRETER
def test_joint_is_kept_in_the_order_of_the_rows(device):
    """What training saves: gate and up before the activation, and nothing in rows that belong to nobody."""
    for layout in ("concat", "interleaved_transposed", "ungated"):
        case = case_of(7, layout=layout, bias=True)
        given = {name: case[name] for name in ("gate_up", "down", "gate_up_bias", "down_bias")}
        w = kernels.Weights.of(**given, activation="silu", alpha=ALPHA, limit=LIMIT, layout=layout)
        rows = kernels.plan_rows(case["experts"], 5, 16)
        _, joint = kernels.up_sorted(case["x"], rows, 3, w, SORTED, save_joint=True)
        total = int(rows.offsets[5])
        owner = torch.searchsorted(rows.offsets[1:6], torch.arange(total, dtype=torch.int32), right=True)
        x = case["x"][rows.slots[:total].long() // 3]
        expected = torch.einsum("rh,rnh->rn", x, w.gate_up[owner]) + case["gate_up_bias"][owner]
        torch.testing.assert_close(joint[:total], expected)
        assert joint[total:].isnan().all()


def _drop_tile(rows):
    offsets = rows.offsets.clone()
    offsets[-1] -= 1
    return rows._replace(offsets=offsets)


def _swap_slots(rows):
    """The first row of expert 0 and the last of expert 4."""
    slots, last = rows.slots.clone(), int(rows.offsets[5]) - 1
    slots[[0, last]] = slots[[last, 0]]
    return rows._replace(slots=slots)


def _wrong_expert(rows):
    owners = rows.tile_expert.clone()
    owners[0] = owners[1]
    return rows._replace(tile_expert=owners)


@IN_INTERPRETER
@pytest.mark.parametrize("spoil", [_drop_tile, _swap_slots, _wrong_expert])
def test_spoilt_rows_are_seen(device, spoil, monkeypatch):
    """A row that is never written, a token that goes to the wrong expert: planted between the launches."""
    case = case_of(7, dtype=torch.bfloat16, skip=False)
    assert verdict(run(device, case, SORTED), case).ok
    sort = kernels.plan_rows
    monkeypatch.setattr(kernels, "plan_rows", lambda *arguments: spoil(sort(*arguments)))
    assert not verdict(run(device, case, SORTED), case).ok


FAULTS: dict[str, Any] = {
    "an expert dropped": lambda case: {"experts": case["experts"].masked_fill(case["experts"] == 1, -1)},
    "one token misrouted": lambda case: {"experts": case["experts"].index_fill(0, torch.tensor([3]), 1)},
    "weights 2 % too large": lambda case: {"weights": case["weights"] * 1.02},
    "gate and up swapped": lambda case: {"gate_up": torch.cat(case["gate_up"].chunk(2, dim=1)[::-1], dim=1)},
    "a bias left out": lambda case: {"down_bias": None},
    "the end of H left out": lambda case: {"x": case["x"].index_fill(1, torch.tensor([39]), 0)},
}


@IN_INTERPRETER
@pytest.mark.parametrize("plan", ["pairs", "scan", "sorted"])
def test_planted_faults_are_seen(device, plan):
    case = case_of(4, bias=True, skip=False)
    right = run(device, case, PLANS[plan])
    assert verdict(right, case).ok
    for name in FAULTS if plan == "scan" else ("one token misrouted", "gate and up swapped"):
        assert not verdict(run(device, case | FAULTS[name](case), PLANS[plan]), case).ok, name
    assert not verdict(right.index_fill(0, torch.tensor([3]), 0), case).ok
    assert not verdict(right.index_fill(0, torch.tensor([-1]), torch.nan), case).ok
    assert not verdict(right.roll(1, 0), case).ok


@IN_INTERPRETER
def test_the_order_of_the_work_changes_no_bit(device):
    """Which tiles run beside each other is a matter of speed alone."""
    case = case_of(12, skip=False)
    first = run(device, case, SORTED)
    for plan in (replace(SORTED, group=1), replace(SORTED, group=16)):
        assert torch.equal(run(device, case, plan), first)
