"""Grouped GEMMs over sorted rows become one operator; each near-miss is left alone, and says what is otherwise."""

import pytest
import torch

from dsmoe_passes.canonicalise import canonicalise
from dsmoe_passes.match_experts import match_experts
from dsmoe_runtime.agreement import assert_within_budget
from tests.passes.dispatches import Grouped, routing, trace
from tests.passes.loops import called

SPELLINGS = {
    "": "concat",
    "transposed": "concat_transposed",
    "interleaved": "interleaved",
    "ungated": "ungated",
    "float activation": "concat",
    "bias": "concat",
    "bias of the first only": "concat",
    "bias masked": "concat",
    "one hot": "concat",
    "weights first": "concat",
    "weighted by slot": "concat",
    "index_add": "concat",
    "argsort": "concat",
}
NEAR_MISSES = {
    "gate and up swapped": "up lies before gate",
    "other activation": "the activation is none of",
    "activation reads a parameter": "the activation reads norm beside the first GEMM's output",
    "activation reads part of one": "beside the first GEMM's output",
    "hidden used": "has another user",
    "output used": "must be used once",
    "norm": "must be used once, in the sum over experts; it is used by",
    "softplus": "changes an expert's output before it is weighted",
    "descending": "no cumulative sum of how many rows each expert has",
    "other token": "rows are those of slot // 3, but tokens choose 2 experts",
    "slots by expert first": "not by the token of each chosen expert",
    "weights on the input": "weights on their input",
    "weights computed": "is computed in the graph",
    "bias by slot": "not by the expert of each row",
    "last expert masked": "the activation reads unsqueeze beside",
    "other offsets": "no cumulative sum of how many rows each expert has",
    "other ids": "the groups are those of",
    "other range": "no cumulative sum of how many rows each expert has",
    "first bin": "no cumulative sum of how many rows each expert has",
    "weights by slot": "their weights in that of the slots",
    "float16 product": "outputs are weighted in torch.float16",
    "unweighted": "without their routing weights",
    "order for inverse": "not the inverse of the sort",
    "not put back": "in the order of the sort",
    "other sum": "not as [T, 2, 16]",
    "sum of the width": "the slots of a token are dimension 1",
}


def rewritten(twist: str) -> tuple[torch.fx.GraphModule, object]:
    gm = trace(Grouped(twist), *routing())
    canonicalise(gm)
    result = match_experts(gm)
    gm.graph.lint()
    gm.recompile()
    return gm, result


@pytest.mark.parametrize("twist", SPELLINGS)
def test_grouped_gemms_become_one_operator_with_the_same_numbers(twist: str) -> None:
    gm, result = rewritten(twist)
    assert not result.refused
    assert [r.pattern for r in result.rewritten] == ["grouped_mm"]
    assert not called(gm, "aten._grouped_mm.default")
    assert not called(gm, "aten.sort.default")
    (node,) = called(gm, "dsmoe.experts.default")
    assert node.args[-1] == SPELLINGS[twist]
    assert (node.args[5] is not None, node.args[6] is not None) == (twist.startswith("bias"), twist == "bias")
    for tokens in (1, 7, 40):
        inputs = routing(tokens)
        y, eager = gm(*inputs)[0], Grouped(twist)(*inputs)[0]
        exact = torch.ops.dsmoe.experts(*in_float64(node, Grouped(twist), inputs))
        assert_within_budget(y, eager=eager, exact=exact)


def in_float64(node: torch.fx.Node, module: Grouped, inputs: tuple[torch.Tensor, ...]) -> list:
    """The operator's arguments with the same values in float64."""
    x, weights, ids = inputs
    biases = [getattr(module, name).double() if node.args[i] is not None else None for i, name in BIASES]
    stacked = [module.gate_up.double(), module.down.double(), *biases]
    return [x.double(), ids, weights.double(), *stacked, *node.args[7:]]


BIASES = ((5, "gate_up_bias"), (6, "down_bias"))


@pytest.mark.parametrize("twist", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(twist: str) -> None:
    gm, result = rewritten(twist)
    assert not result.rewritten
    assert not called(gm, "dsmoe.experts.default")
    assert len(result.refused) == 1
    assert NEAR_MISSES[twist] in result.refused[0].because
    assert result.refused[0].node in {node.name for node in gm.graph.nodes}


def test_a_grouped_gemm_without_a_second_is_refused() -> None:
    class Alone(Grouped):
        def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            in_order, order = torch.sort(ids.reshape(-1))
            offsets = self.offsets(ids.reshape(-1), in_order, ids)
            return torch._grouped_mm(x[order // 2], self.gate_up.mT, offs=offsets)

    gm = trace(Alone(), *routing())
    canonicalise(gm)
    result = match_experts(gm)
    assert not result.rewritten
    assert [refusal.because for refusal in result.refused] == [
        "no second GEMM over the same experts reads what _grouped_mm and an activation give"
    ]


def test_a_layer_that_reads_another_directly_is_fused_too() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Grouped(), Grouped()

        def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x, weights, ids)[0], weights, ids)[0]

    gm = trace(Two(), *routing())
    canonicalise(gm)
    match_experts(gm)
    gm.graph.lint()
    first, second = called(gm, "dsmoe.experts.default")
    assert second.args[0] is first
    assert not called(gm, "aten._grouped_mm.default")
