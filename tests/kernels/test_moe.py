"""The whole layer by kernels against the rule and the oracle: routing by its gaps, values with the routing forced."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsmoe_runtime.agreement import routing_agreement, within_budget
from dsmoe_runtime.kernels import moe as kernels
from dsmoe_runtime.kernels.launch import INTERPRETED
from dsmoe_runtime.ops.experts import experts as experts_rule
from dsmoe_runtime.ops.mlp import mlp
from dsmoe_runtime.ops.moe import moe as rule
from dsmoe_runtime.ops.moe import router_logits
from dsmoe_runtime.ops.route import _scores, weights_of
from tests.kernels.cases import IN_INTERPRETER, ON_GPU, PLANS
from tests.runtime.op_cases import GATES, layer_of, moe_arguments, normal, small_config, weight

pytestmark = pytest.mark.usefixtures("poison")
SMALL = {"hidden_size": 40, "moe_intermediate_size": 24}
(ROUTER_WEIGHT, ROUTER_BIAS, SELECTION_BIAS, EXPERTS_GATE_UP, SHARED_DOWN, SHARED_GATE) = (0, 1, 2, 12, 21, 22)


def arguments_of(dtype: torch.dtype = torch.float32, layout: str = "concat", **changes: Any) -> tuple[Any, ...]:
    """What the operator takes after x, for a small layer of the oracle's."""
    layer = layer_of(small_config(**(SMALL | changes)), dtype).requires_grad_(False)
    return moe_arguments(layer, layout)


def moved(arguments: Any, device: str) -> list[Any]:
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]


def forced(x: torch.Tensor, arguments: Any, experts: torch.Tensor) -> torch.Tensor:
    """The layer in float64 with its choice of experts taken over: their weights, their answers, the shared experts'."""
    exact = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    logits = router_logits(x.double(), *exact[:2], "float32")
    y = experts_rule(x.double(), experts, weights_of(logits, experts, exact[4], *exact[8:11]), *exact[12:20])
    gate_up, down, gate = exact[20:]
    if gate_up is not None:
        shared = mlp(x.double(), gate_up, down, None, None, *exact[16:19], False, not exact[19].startswith("ungated"))
        y = y + (shared if gate is None else shared * (x.double() @ gate.T).sigmoid())
    return y


def complaint(answer: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, arguments: Any) -> str | None:
    """What is wrong with `answer` = y, experts, or None."""
    y, experts = answer
    eager_y, eager_experts = rule(x, *arguments)
    if (y.shape, y.dtype, experts.shape, experts.dtype) != (x.shape, x.dtype, eager_experts.shape, torch.int64):
        return f"{tuple(y.shape)} {y.dtype}, {tuple(experts.shape)} {experts.dtype}"
    router, router_bias, bias, _, score, n_group, topk_group, group_score = arguments[:8]
    added = 0.0 if bias is None else bias
    exact_logits = router_logits(x.double(), router, router_bias, "float32")
    routing = routing_agreement(
        experts,
        eager_experts,
        exact_TE=_scores(exact_logits, score) + added,
        eager_TE=_scores(router_logits(x, router, router_bias, arguments[11]), score) + added,
        n_group=1 if topk_group == n_group else n_group,
        topk_group=1 if topk_group == n_group else topk_group,
        group_score=group_score,
    )
    if not routing.ok:
        return str(routing)
    values = within_budget(
        y,
        eager=eager_y,
        exact=forced(x, arguments, experts),
        exact_eager=forced(x, arguments, eager_experts),
        factor=6.0 if INTERPRETED and x.dtype == torch.bfloat16 else 2.0,
    )
    return None if values.ok else str(values)


def run(device: str, x: torch.Tensor, arguments: Any, plan: str | None, monkeypatch) -> tuple[torch.Tensor, ...]:
    """The kernels' answer on the CPU, by the plan of this name, or by the one that they choose."""
    with monkeypatch.context() as patch:
        if plan is not None:
            patch.setattr(kernels, "plan_for", lambda *_: PLANS[plan])
        return tuple(t.cpu() for t in kernels.moe(x.to(device), *moved(arguments, device)))


@IN_INTERPRETER
@pytest.mark.parametrize(("gate", "plan"), list(zip(GATES, 3 * ("pairs", "scan", "sorted"), strict=False)))
def test_every_gate(device, gate, plan, monkeypatch):
    """With two shared experts: as slices in the launches of pairs and scan, beside those of sorted."""
    x, arguments = normal(4, 40, seed=1), arguments_of(**GATES[gate])
    assert not complaint(run(device, x, arguments, plan, monkeypatch), x, arguments)


@IN_INTERPRETER
@pytest.mark.parametrize(("tokens", "shared"), [(0, 1), (1, 0), (1, 1), (7, 0)])
def test_any_number_of_tokens_as_the_kernels_choose(device, shared, tokens, monkeypatch):
    x, arguments = normal(tokens, 40, seed=2), arguments_of(n_shared_experts=shared)
    assert not complaint(run(device, x, arguments, None, monkeypatch), x, arguments)


@IN_INTERPRETER
@pytest.mark.parametrize(
    ("plan", "layout", "dtype"),
    [("scan", "concat", torch.bfloat16), ("sorted", "interleaved_transposed", torch.float16)],
)
def test_half_precision(device, plan, layout, dtype, monkeypatch):
    x, arguments = normal(4, 40, seed=3, dtype=dtype), arguments_of(dtype, layout, **GATES["V3"])
    assert not complaint(run(device, x, arguments, plan, monkeypatch), x, arguments)


@IN_INTERPRETER
@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("a gate of its own", "pairs"),
        ("a gate of its own", "sorted"),
        ("no slices", "scan"),
        ("interleaved experts", "pairs"),
    ],
)
def test_shared_experts_that_cannot_be_slices(device, kind, plan, monkeypatch):
    """Qwen2-MoE's sigmoid, a width that is no multiple of an expert's, experts that lie otherwise; gpt-oss's bias."""
    x = normal(3, 40, seed=4)
    arguments = list(arguments_of(layout="interleaved" if kind == "interleaved experts" else "concat"))
    arguments[ROUTER_BIAS] = normal(12, seed=5)
    if kind == "a gate of its own":
        arguments[SHARED_GATE] = weight(1, 40, seed=6)
    elif kind == "no slices":
        arguments[20:22] = weight(62, 40, seed=7), weight(40, 31, seed=8)
    assert not complaint(run(device, x, arguments, plan, monkeypatch), x, arguments)


@IN_INTERPRETER
@pytest.mark.parametrize(("plan", "gate"), [("pairs", False), ("sorted", True)])
def test_a_layer_without_gates(device, plan, gate, monkeypatch):
    """Two shared experts: slices in the launches of pairs, and beside those of sorted, there with a sigmoid."""
    x, arguments = normal(3, 40, seed=9), list(arguments_of())
    arguments[12:20] = [arguments[12][:, :24].contiguous(), arguments[13], None, None, "relu2", 0.0, 0.0, "ungated"]
    arguments[20] = arguments[20][:48].contiguous()
    if gate:
        arguments[SHARED_GATE] = weight(1, 40, seed=6)
    answer = run(device, x, arguments, plan, monkeypatch)
    assert not complaint(answer, x, arguments)
    arguments[20] = arguments[20].flip(0)  # a planted fault
    assert "off by" in complaint(answer, x, arguments)


@IN_INTERPRETER
def test_a_bad_token_keeps_to_itself(device, monkeypatch):
    """NaN: its row is NaN, its experts are distinct and in range, and the other rows keep their bits."""
    x, arguments = normal(4, 40, seed=9), arguments_of()
    clean, clean_experts = run(device, x, arguments, "scan", monkeypatch)
    x[2] = torch.nan
    y, experts = run(device, x, arguments, "scan", monkeypatch)
    others = torch.tensor([0, 1, 3])
    assert y[2].isnan().all()
    assert sorted(experts[2].tolist()) == [0, 1, 2]
    assert torch.equal(experts[others], clean_experts[others])
    assert torch.equal(y[others], clean[others])


@IN_INTERPRETER
def test_planted_faults_are_seen(device, monkeypatch):
    x, arguments = normal(2, 40, seed=10), arguments_of(**GATES["V3"])
    right = run(device, x, arguments, "scan", monkeypatch)
    assert not complaint(right, x, arguments)

    def seen(index: int, value: Any) -> str | None:
        given = list(arguments)
        given[index] = value
        return complaint(run(device, x, given, "scan", monkeypatch), x, arguments)

    assert "left out" in seen(SELECTION_BIAS, None)
    assert "left out" in seen(7, "max")
    assert "off by" in seen(10, 2.5 * 1.02)
    assert "off by" in seen(8, False)
    swapped = torch.cat(arguments[EXPERTS_GATE_UP].chunk(2, dim=1)[::-1], dim=1)
    assert "off by" in seen(EXPERTS_GATE_UP, swapped)
    assert "off by" in seen(SHARED_DOWN, arguments[SHARED_DOWN] * 1.02)
    misrouted = (right[0], right[1].roll(1, 0))
    assert complaint(misrouted, x, arguments)
    assert "off by" in complaint((right[0].roll(1, 0), right[1]), x, arguments)


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gate", ["v1", "V3"])
def test_the_operator_on_a_gpu(device, gate, dtype, monkeypatch):
    """Kernels of the chosen plans; sizes that the copy engine can read."""
    arguments = arguments_of(dtype, **GATES[gate], hidden_size=256, moe_intermediate_size=160)
    given = moved(arguments, device)
    for tokens in (0, 1, 7, 63, 300):
        x = normal(tokens, 256, seed=11, dtype=dtype)
        answer = torch.ops.dsmoe.moe(x.to(device), *given)
        assert not complaint(tuple(t.cpu() for t in answer), x, arguments), tokens
