"""A loop over experts becomes one operator; each near-miss is left alone, and says which thing is otherwise."""

import pytest
import torch

from dsmoe_passes.canonicalise import canonicalise
from dsmoe_passes.match_experts import match_experts
from tests.passes.loops import Loop, called, inputs, trace

LAYOUTS = {
    "": "concat",
    "interleaved": "interleaved",
    "transposed": "concat_transposed",
    "bias": "concat",
    "one hot": "concat",
}
NEAR_MISSES = {
    "other bias": "the gate and up weight is that of expert 0, its bias that of expert 1",
    "slot for token": "added at their slots, not at their tokens",
    "gate and up swapped": "up lies before gate",
    "intermediate used": "has another user",
    "weights used elsewhere": "the experts' weights have another user",
    "expert missing": "holds 5 experts, the loop misses [4]",
    "other expert": "tokens of expert 0 meet gate_up_proj[0] and down_proj[1]",
    "other slot": "read at other places than the chosen tokens and slots",
    "other input": "expert 2 reads",
    "other activation": "the activation is none of silu",
    "one other activation": "expert 3 has another activation than expert 0",
    "unweighted": "not multiplied by its routing weight",
    "added twice": "not added row by row with factor 1",
    "weighted in bfloat16": "outputs are weighted in torch.bfloat16",
    "starts from x": "does not start from zeros",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("twist", LAYOUTS)
def test_a_loop_becomes_one_operator_with_the_same_numbers(twist: str, dtype: torch.dtype) -> None:
    module, x = Loop(twist).to(dtype), inputs(dtype)
    gm = trace(module, x)
    canonicalise(gm)
    assert len(called(gm, "aten.index_add.default")) == 5
    result = match_experts(gm)
    gm.recompile()
    assert [r.operator for r in result.rewritten] == ["dsmoe::experts"]
    assert not result.refused
    assert not called(gm, "aten.index_add.default")
    assert not called(gm, "aten.where.default")
    (node,) = called(gm, "dsmoe.experts.default")
    assert node.args[-1] == LAYOUTS[twist]
    assert (node.args[5] is not None, node.args[6] is not None) == (twist == "bias", twist == "bias")
    exact = Loop(twist).double()
    exact.load_state_dict({k: v.to(dtype).double() for k, v in Loop(twist).state_dict().items()})
    for tokens in (0, 1, 7):
        x = inputs(dtype)[:1].repeat(tokens, 1) * torch.linspace(0.5, 2, tokens)[:, None].to(dtype)
        y, experts = gm(x)
        y64 = exact.experts(x.double(), *routing_of(module, x))[0]
        eager = module(x)[0]
        assert torch.equal(experts, module(x)[1])
        assert y.shape == x.shape
        error, budget = (y.double() - y64).norm(dim=-1), 2 * (eager.double() - y64).norm(dim=-1)
        assert (error <= budget + torch.finfo(dtype).eps * y64.norm(dim=-1)).all()


def routing_of(module: Loop, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.nn.functional.linear(x.float(), module.router.float()).softmax(-1)
    experts = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :2]
    return scores.gather(1, experts).double(), experts


@pytest.mark.parametrize("twist", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(twist: str) -> None:
    module, x = Loop(twist), inputs()
    gm = trace(module, x)
    canonicalise(gm)
    result = match_experts(gm)
    gm.recompile()
    assert not result.rewritten
    assert not called(gm, "dsmoe.experts.default")
    (refusal,) = result.refused
    assert NEAR_MISSES[twist] in refusal.because
    assert refusal.node in {node.name for node in gm.graph.nodes}
    torch.testing.assert_close(gm(x), module(x), rtol=0, atol=0)


def test_an_index_add_that_chooses_no_expert_is_no_layer() -> None:
    class Histogram(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(3, 12).index_add(0, torch.zeros(x.shape[0], dtype=torch.int64), x)

    gm = trace(Histogram(), inputs())
    canonicalise(gm)
    result = match_experts(gm)
    assert (result.rewritten, result.refused) == ((), ())
