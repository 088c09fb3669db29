"""dsmoe::route through MLIR: the operator's own choice, to the index, and its weights within the budget."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch_mlir")

from dsmoe_runtime.agreement import assert_within_budget, routing_agreement
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.levels import LEVELS, cpu_flags
from dsmoe_runtime.mlir.route import route
from dsmoe_runtime.ops.route import _scores
from tests.runtime.op_cases import normal

pytestmark = pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2")

V1 = ("softmax", 1, 1, "max", False, 1e-20, 1.0)
GATES = {
    "v1": V1,
    "v1 renormalised": ("softmax", 1, 1, "max", True, 1e-20, 1.0),
    "V2": ("softmax", 4, 2, "max", False, 1e-20, 16.0),
    "V3": ("sigmoid", 4, 2, "top2", True, 1e-20, 2.5),
    "V4": ("sqrtsoftplus", 1, 1, "max", True, 1e-20, 1.5),
    "gpt-oss": ("softmax_after_topk", 1, 1, "max", False, 1e-20, 1.0),
}


def theirs(logits, bias, top_k, gate):
    return torch.ops.dsmoe.route(logits, bias, top_k, *gate)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("name", GATES)
def test_every_gate(name, tokens, with_bias):
    """Experts by the gap between scores; weights against float64, where both chose the same.

    Four times eager's error: rows of six numbers have no average to hide a unit in the last place in."""
    gate = GATES[name]
    logits, bias = 2 * normal(tokens, 60, seed=1), 0.1 * normal(60, seed=2) if with_bias else None
    weights, experts = route(logits, bias, 6, *gate)
    eager, eager_experts = theirs(logits, bias, 6, gate)
    exact, _ = theirs(logits.double(), None if bias is None else bias.double(), 6, gate)
    added = 0 if bias is None else bias
    verdict = routing_agreement(
        experts, eager_experts, exact_TE=_scores(logits.double(), gate[0]) + added,
        eager_TE=_scores(logits, gate[0]) + added, n_group=gate[1], topk_group=gate[2], group_score=gate[3],
    )  # fmt: skip
    assert verdict.ok, str(verdict)
    same = (experts == eager_experts).all(dim=1)
    assert same.float().mean() > 0.99 or tokens == 0
    assert_within_budget(weights[same], eager=eager[same], exact=exact[same], factor=4.0)


@pytest.mark.parametrize("gate", [GATES["v1"], GATES["V2"], GATES["V3"]])
def test_of_equals_the_lowest_index_comes_first(gate):
    logits = torch.zeros(3, 12)
    logits[1, 5::2] = 1.0
    logits[2] = -0.0
    logits[2, 3] = 0.0
    assert torch.equal(route(logits, None, 5, *gate)[1], theirs(logits, None, 5, gate)[1])


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 3), (63, 7), (160, 16)])
def test_any_number_of_experts(experts, top_k):
    logits = normal(20, experts, seed=3)
    assert torch.equal(route(logits, None, top_k, *V1)[1], theirs(logits, None, top_k, V1)[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", GATES)
def test_what_is_not_finite_stays_with_its_token(name, bad):
    """Distinct experts in range whatever a row holds; NaN reaches its own token's weights and no other's."""
    logits = normal(5, 12, seed=4)
    clean_weights, clean_experts = route(logits, None, 3, *GATES[name])
    logits[2, 7] = bad
    weights, experts = route(logits, None, 3, *GATES[name])
    assert torch.equal(experts, theirs(logits, None, 3, GATES[name])[1])
    others = torch.arange(5) != 2
    assert torch.equal(experts[others], clean_experts[others])
    assert torch.equal(weights[others], clean_weights[others])
    if bad != bad:
        assert weights[2].isnan().any()


def test_same_bits_for_any_number_of_threads():
    logits, before = normal(200, 64, seed=5), torch.get_num_threads()
    results = []
    for threads in (1, 2, 2, 2):
        torch.set_num_threads(threads)
        results.append(route(logits, None, 6, *V1))
    torch.set_num_threads(before)
    for weights, experts in results[1:]:
        assert torch.equal(weights, results[0][0])
        assert torch.equal(experts, results[0][1])


def test_half_precision_logits_are_refused():
    with pytest.raises(TargetError, match="router_dtype 'float32'"):
        route(normal(3, 4, seed=6).bfloat16(), None, 1, *V1)
