"""Batched GEMMs with gathered weights become one operator; each near-miss is left alone, and says what is otherwise."""

import pytest
import torch

from dsmoe_passes.canonicalise import canonicalise
from dsmoe_passes.match_experts import match_experts
from dsmoe_runtime.agreement import assert_within_budget
from tests.passes.dispatches import Batched, routing, trace
from tests.passes.loops import called
from tests.passes.test_match_grouped import in_float64

SPELLINGS = {
    "": "concat",
    "transposed": "concat_transposed",
    "interleaved": "interleaved",
    "ungated": "ungated",
    "right": "concat",
    "bias": "concat",
    "expanded": "concat",
    "tokens gathered": "concat",
    "slots": "concat",
}
NEAR_MISSES = {
    "gate and up swapped": "up lies before gate",
    "norm": "must be used once, in the sum over experts",
    "softplus": "changes an expert's output before it is weighted",
    "tiled": "not the rows of the chosen tokens",
    "weights on the input": "weights on their input",
    "clamped": "not by the flattened ids of the experts",
    "other ids": "not by the flattened ids of the experts",
    "unweighted": "without their routing weights",
    "weights reversed": "which is no routing weight",
}


@pytest.mark.parametrize("twist", SPELLINGS)
def test_batched_gemms_become_one_operator_with_the_same_numbers(twist: str) -> None:
    gm = trace(Batched(twist), *routing())
    canonicalise(gm)
    result = match_experts(gm)
    gm.graph.lint()
    gm.recompile()
    assert not result.refused
    assert [r.pattern for r in result.rewritten] == ["batched_mm"]
    assert not called(gm, "aten.bmm.default")
    (node,) = called(gm, "dsmoe.experts.default")
    assert node.args[-1] == SPELLINGS[twist]
    assert (node.args[5] is not None, node.args[6] is not None) == (twist == "bias", twist == "bias")
    for tokens in (1, 7, 40):
        inputs = routing(tokens)
        y, eager = gm(*inputs)[0], Batched(twist)(*inputs)[0]
        exact = torch.ops.dsmoe.experts(*in_float64(node, Batched(twist), inputs))
        assert_within_budget(y, eager=eager, exact=exact)


@pytest.mark.parametrize("twist", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(twist: str) -> None:
    gm = trace(Batched(twist), *routing())
    canonicalise(gm)
    result = match_experts(gm)
    assert not result.rewritten
    assert all(NEAR_MISSES[twist] in refusal.because for refusal in result.refused), result.refused
    assert result.refused
