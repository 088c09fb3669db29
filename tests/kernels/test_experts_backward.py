"""The backward kernels of the experts, and the training forward, against the rules and float64; planted faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from dsmoe_runtime.agreement import assert_within_budget, row_error, within_budget
from dsmoe_runtime.kernels import backward_gemms
from dsmoe_runtime.kernels import experts_backward as kernels
from dsmoe_runtime.kernels.experts_training import experts_training
from dsmoe_runtime.kernels.launch import INTERPRETED
from dsmoe_runtime.kernels.plan import Tile
from dsmoe_runtime.kernels.plan_backward import HALF, BackwardPlan
from dsmoe_runtime.ops.activation import activate, halves
from dsmoe_runtime.ops.experts_backward import experts_backward as rule
from dsmoe_runtime.ops.experts_training import keep
from tests.kernels.cases import widened
from tests.runtime.op_cases import (
    ALPHA,
    COMBINATIONS,
    LAYOUTS,
    LIMIT,
    attributes,
    exact,
    expert_case,
    laid_out,
    normal,
)

pytestmark = pytest.mark.usefixtures("poison")

SMALL = BackwardPlan(*4 * (Tile(16, 32, 32, 4, 2),), group=2, half=False)
TENSORS = ("x", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
SIZES = {"hidden": 40, "width": 24, "num_experts": 5, "top_k": 3}
LARGE = {"hidden": 264, "width": 176, "num_experts": 9, "top_k": 4}


def case_of(tokens, *, layout="concat", skip=True, **changes):
    """A case with two skipped slots and its `grad`; on a GPU eight times the tokens, and sizes beyond one tile."""
    sizes = (SIZES if INTERPRETED else LARGE) | changes
    case = laid_out(expert_case(tokens if INTERPRETED else 8 * tokens, **sizes), layout)
    if skip and tokens > 2:
        case["experts"][1, 0], case["experts"][2, -1] = -1, sizes["num_experts"]
    return case | {"grad": normal(*case["x"].shape, seed=9, dtype=case["x"].dtype)}


def on(device, case):
    return {name: value if value is None else value.to(device) for name, value in case.items()}


def run(device, case, activation, layout, plan=None, weight_grads=True, spoil=None):
    """The kernels' six gradients on the CPU, from what the forward keeps (in plain torch here), perhaps spoilt."""
    case = on(device, case)
    kept = keep(case["x"], case["experts"], case["gate_up"], case["gate_up_bias"], layout)
    joint, slots, offsets = spoil(*kept) if spoil else kept
    joint[offsets[-1] :] = torch.nan  # what the forward never wrote
    arguments = case | attributes(activation, layout) | {"weight_grads": weight_grads}
    grads = kernels.experts_backward(**arguments, joint=joint, slots=slots, offsets=offsets, plan=plan)
    return tuple(grad.cpu() for grad in grads)


def eager(case, activation, layout):
    """Autograd through an expert-by-expert loop in the case's own dtype."""
    leaf = {n: None if case[n] is None else case[n].detach().clone().requires_grad_() for n in TENSORS}
    gate_up, down = leaf["gate_up"], leaf["down"]
    if layout.endswith("_transposed"):
        gate_up, down = gate_up.mT, down.mT
    y = torch.zeros_like(case["x"])
    for e in range(len(gate_up)):
        tokens, ks = (case["experts"] == e).nonzero(as_tuple=True)
        bias = [None if leaf[n] is None else leaf[n][e] for n in ("gate_up_bias", "down_bias")]
        joint = F.linear(leaf["x"][tokens], gate_up[e], bias[0])
        answers = F.linear(activate(*halves(joint, layout), activation, ALPHA, LIMIT), down[e], bias[1])
        y = y.index_add(0, tokens, answers * leaf["weights"][tokens, ks, None].to(y.dtype))
    used = [t for t in leaf.values() if t is not None]
    grads = iter(torch.autograd.grad(y, used, case["grad"], materialize_grads=True))
    return tuple(case["x"].new_empty(0) if t is None else next(grads) for t in leaf.values())


def verdicts(case, activation, layout, actual):
    """Each gradient's agreement with float64, by the budget that eager sets in the same dtype.

    A row is a token's gradient of x, an expert's of a weight, and all those of the routing weights: the sum of a few
    slots may cancel, in eager as in ours, so a single row of a matrix says little.
    """
    factor = widened(case["x"].dtype)
    expected = rule(**exact(case), **attributes(activation, layout), weight_grads=True)
    results = {}
    for name, ours, theirs, truth in zip(TENSORS, actual, eager(case, activation, layout), expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        if truth.numel():
            rows = 1 if name == "weights" else len(truth)
            ours, theirs, truth = (t.reshape(rows, -1) for t in (ours, theirs, truth))
            results[name] = within_budget(ours, eager=theirs, exact=truth, factor=factor)
    return results


def check(device, case, activation="silu", layout="concat", plan=None):
    for name, verdict in verdicts(case, activation, layout, run(device, case, activation, layout, plan)).items():
        assert verdict.ok, f"{name}: {verdict}"


@pytest.mark.parametrize(("activation", "layout"), COMBINATIONS)
def test_every_activation_and_layout(device, activation, layout):
    """Each of both with biases and without."""
    place = COMBINATIONS.index((activation, layout))
    bias = (place + place // 4) % 2 == 1
    check(device, case_of(7, layout=layout, bias=bias), activation, layout)


@pytest.mark.parametrize(
    ("dtype", "activation", "layout", "bias"),
    [
        (torch.bfloat16, "silu", "concat", False),
        (torch.float16, "swiglu_oai", "interleaved", True),
        (torch.bfloat16, "silu_clamped", "concat_transposed", True),
        (torch.bfloat16, "relu2", "ungated", True),
        (torch.float16, "gelu_tanh", "concat", False),
    ],
)
def test_half_precision(device, dtype, activation, layout, bias):
    check(device, case_of(12, layout=layout, bias=bias, dtype=dtype), activation, layout)


@pytest.mark.parametrize(
    ("tokens", "plan"),
    [
        *((0, SMALL), (1, SMALL), (20, SMALL)),
        (12, BackwardPlan(*4 * (Tile(32, 32, 16, 4, 2),), group=1)),  # tiles of full and of half height
    ],
)
def test_any_number_of_tokens_and_any_cut(device, tokens, plan):
    """Ragged rows, columns and depth; an expert without rows gets zeros."""
    case = case_of(tokens, hidden=33, width=19, skip=tokens != 1)
    case["experts"].masked_fill_(case["experts"] == 2, 4)
    check(device, case, plan=plan)
    assert not run(device, case, "silu", "concat", plan)[2][2].any()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU reads so by itself")
@pytest.mark.parametrize("layout", ["concat", "interleaved_transposed"])
def test_reads_by_descriptor(device, monkeypatch, layout):
    """The path of the copy engine, as the interpreter plays it; 20 tokens: whole blocks of rows and what is left."""
    monkeypatch.setattr(backward_gemms, "by_tma", lambda tensor: tensor.stride(-1) == 1)
    case = case_of(20, layout=layout, num_experts=3)
    plan = BackwardPlan(*2 * (Tile(32, 16, 16, 4, 2),), *2 * (Tile(16, 32, 8, 4, 2),), group=2)
    check(device, case, "silu", layout, plan)
    case["grad"][4] = torch.nan
    dirty = run(device, case, "silu", layout, plan)
    assert not dirty[0][torch.arange(20) != 4].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", [HALF, replace(HALF, half=False), replace(HALF, descriptors=False)])
def test_wide_tiles(device, layout, plan):
    """What training runs: weights, and rows in order, by the copy engine."""
    check(device, case_of(80, layout=layout, hidden=512, width=384, dtype=torch.bfloat16), "silu", layout, plan)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_all_slots_on_one_expert(device, num_experts):
    case = case_of(20, num_experts=num_experts, top_k=1)
    case["experts"].clamp_(0, 0)
    check(device, case, plan=SMALL)


def test_without_gradients_of_the_weights(device):
    case = case_of(7)
    full, part = (run(device, case, "silu", "concat", SMALL, weight_grads=wanted) for wanted in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(full[:2], part[:2], strict=True))
    assert [tuple(grad.shape) for grad in part[2:]] == [(0,)] * 4


def test_strides_of_any_kind(device):
    """The gradient of a sum has stride 0; x and the weights lie transposed in memory."""
    case = case_of(7, bias=True)
    case["grad"] = torch.full((1, 1), 0.7).expand_as(case["x"])
    plain = run(device, case | {"grad": case["grad"].contiguous()}, "silu", "concat", SMALL)
    for name in ("x", "weights", "gate_up", "down"):
        case[name] = case[name].mT.contiguous().mT
    for actual, expected in zip(run(device, case, "silu", "concat", SMALL), plain, strict=True):
        assert (row_error(actual.flatten(1), expected.flatten(1)) <= 1e-5).all()  # sums in another order


def test_nan_stays_with_its_token_and_its_experts(device):
    case = case_of(7)
    clean = run(device, case, "silu", "concat", SMALL)
    case["grad"][4] = torch.nan
    dirty = run(device, case, "silu", "concat", SMALL)
    hit = torch.zeros(len(case["gate_up"]), dtype=torch.bool)
    hit[[e for e in case["experts"][4].tolist() if 0 <= e < len(hit)]] = True
    assert dirty[0][4].isnan().all()
    others = torch.arange(len(case["x"])) != 4
    for index, kept in ((0, others), (1, others), (2, ~hit), (3, ~hit)):
        assert torch.equal(dirty[index][kept], clean[index][kept])


def test_same_bits_on_every_run(device):
    case = case_of(7, bias=True, dtype=torch.float16)
    first = run(device, case, "silu", "concat")
    for _ in range(1 if INTERPRETED else 20):
        assert all(torch.equal(a, b) for a, b in zip(run(device, case, "silu", "concat"), first, strict=True))


@pytest.mark.parametrize("fault", ["an expert dropped", "gate and up swapped", "weights 2 % too large"])
def test_a_planted_fault_is_seen(device, fault):
    case = case_of(7, skip=False)
    given, spoil = dict(case), None
    if fault == "an expert dropped":
        given["experts"] = case["experts"].masked_fill(case["experts"] == 1, -1)
    elif fault == "gate and up swapped":
        spoil = lambda joint, slots, offsets: (joint.roll(joint.shape[1] // 2, 1), slots, offsets)  # noqa: E731
    else:
        given["weights"] = case["weights"] * 1.02
    found = verdicts(case, "silu", "concat", run(device, given, "silu", "concat", SMALL, spoil=spoil))
    assert not found["x"].ok
    assert not found["gate_up"].ok


@pytest.mark.parametrize(
    ("tokens", "layout"), [(0, "concat"), (1, "interleaved_transposed"), (7, "concat"), (0, "ungated"), (7, "ungated")]
)
def test_the_training_forward_keeps_what_the_rule_keeps(device, layout, tokens):
    """Rows that belong to an expert, that is; then a backward without any of it computes it again."""
    case = case_of(tokens, layout=layout, bias=True)
    grad = case.pop("grad")
    given = on(device, case)
    y, joint, slots, offsets = (t.cpu() for t in experts_training(**given, **attributes("silu", layout)))
    expected = torch.ops.dsmoe.experts(**exact(case), **attributes("silu", layout))
    eager_y = torch.ops.dsmoe.experts(**case, **attributes("silu", layout))
    assert_within_budget(y, eager=eager_y, exact=expected)
    kept = keep(case["x"], case["experts"], case["gate_up"], case["gate_up_bias"], layout)
    assert torch.equal(offsets, kept[2])
    count = int(offsets[-1])
    assert torch.equal(slots[:count], kept[1][:count])
    torch.testing.assert_close(joint[:count], kept[0][:count])
    arguments = {"grad": grad.to(device)} | given | attributes("silu", layout) | {"weight_grads": True}
    again = kernels.experts_backward(**arguments)
    kept = {"joint": joint.to(device), "slots": slots.to(device), "offsets": offsets.to(device)}
    for one, other in zip(again, kernels.experts_backward(**arguments, **kept), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_operators_on_a_gpu(device, tokens):
    """opcheck, and autograd from end to end, through the kernels."""
    case = case_of(tokens, bias=True)
    grad = case.pop("grad")
    leaves = {n: t.to(device).requires_grad_() if n in TENSORS else t.to(device) for n, t in case.items()}
    torch.library.opcheck(torch.ops.dsmoe.experts.default, (), leaves | attributes())
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")  # rows of skipped slots hold anything
    torch.library.opcheck(torch.ops.dsmoe.experts_training.default, (), leaves | attributes(), test_utils=checks)
    torch.ops.dsmoe.experts(**leaves, **attributes()).backward(grad.to(device))
    found = verdicts(case | {"grad": grad}, "silu", "concat", tuple(leaves[name].grad.cpu() for name in TENSORS))
    assert all(verdict.ok for verdict in found.values()), found
