"""Every gate that `dsmoe::route` can express is recognised by what it computes; others say why not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dsmoe_model.config import ModelConfig
from dsmoe_model.moe import MoE
from dsmoe_passes.canonicalise import canonicalise
from dsmoe_passes.match_experts import match_experts
from dsmoe_passes.match_router import match_router
from tests.passes.loops import called, trace

BASE = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=16,
    intermediate_size=24,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=8,
)
V3 = {"scoring_func": "sigmoid", "selection_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
GATES: dict[str, tuple[dict, tuple]] = {
    "v1": ({}, (3, "softmax", 1, 1, "max", False, 0.0, 1.0)),
    "switch": ({"num_experts_per_tok": 1}, (1, "softmax", 1, 1, "max", False, 0.0, 1.0)),
    "v1 all experts": ({"num_experts_per_tok": 8}, (8, "softmax", 1, 1, "max", False, 0.0, 1.0)),
    "renormalised": ({"norm_topk_prob": True}, (3, "softmax", 1, 1, "max", True, 1e-20, 1.0)),
    "v2": (
        {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
        (3, "softmax", 4, 2, "max", False, 0.0, 16.0),
    ),
    "v3": (
        V3 | {"n_group": 4, "topk_group": 2, "group_score": "top2"},
        (3, "sigmoid", 4, 2, "top2", True, 1e-20, 2.5),
    ),
    "v3 without groups": (V3, (3, "sigmoid", 1, 1, "max", True, 1e-20, 2.5)),
    "v4": (V3 | {"scoring_func": "sqrtsoftplus"}, (3, "sqrtsoftplus", 1, 1, "max", True, 1e-20, 2.5)),
    "after top-k": (
        {"scoring_func": "softmax_after_topk"},
        (3, "softmax_after_topk", 1, 1, "max", False, 0.0, 1.0),
    ),
}


class Layer(nn.Module):
    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.moe = MoE(replace(BASE, **changes))  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(0)
        for parameter in self.moe.parameters():
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        bias = getattr(self.moe.router, "e_score_correction_bias", None)
        if bias is not None:
            bias.normal_(generator=generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, routing = self.moe(x)
        assert routing is not None
        return y, routing.experts_TK


def raised(module: nn.Module, x: Tensor) -> tuple[torch.fx.GraphModule, object]:
    gm = trace(module, x, dim=1)
    canonicalise(gm)
    assert match_experts(gm).rewritten
    result = match_router(gm)
    gm.recompile()
    return gm, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", GATES)
def test_a_gate_is_recognised_by_what_it_computes(gate: str, dtype: torch.dtype) -> None:
    changes, attributes = GATES[gate]
    module, x = Layer(**changes).to(dtype), torch.randn(1, 6, 16, dtype=dtype)
    gm, result = raised(module, x)
    assert not result.refused
    (node,) = called(gm, "dsmoe.route.default")
    assert node.args[2:] == attributes
    assert (node.args[1] is not None) == ("selection_bias" in changes)
    assert not called(gm, "aten.sort.stable")
    for tokens in (1, 0, 9):
        x = torch.randn(1, tokens, 16, dtype=dtype)
        assert torch.equal(gm(x)[1], module(x)[1])


class Twisted(Layer):
    """A gate with something that the operator has not; the experts are the oracle's."""

    def __init__(self, twist: str) -> None:
        super().__init__()
        self.twist = twist
        self.table = nn.Buffer(torch.arange(8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.reshape(-1, 16)
        logits = (
            x @ self.moe.router.weight.T if self.twist == "matmul" else nn.functional.linear(x, self.moe.router.weight)
        )
        scores = logits.softmax(-1)
        if self.twist == "square of the score":
            scores = scores * scores
        if self.twist == "bias in the weight too":
            scores = scores + self.bias
        experts = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :3]
        if self.twist == "next expert":
            experts = (experts + 1) % 8
        if self.twist == "two biases":
            scores = scores + self.bias * self.table
        if self.twist == "first experts":
            experts = self.table[:3].expand(x.shape[0], 3) + 0 * experts
        return self.moe.experts(x, scores.gather(1, experts), experts), experts


TWISTS = {
    "square of the score": "selects the same experts, but none gives the same weights",
    "bias in the weight too": "selects the same experts, but none gives the same weights",
    "next expert": "no gate of dsmoe::route gives the same ids and weights",
    "two biases": "dsmoe::route takes one bias [8]",
    "first experts": "dsmoe::route takes one bias [8] of floats",
    "matmul": "the expert ids come from no GEMM",
}


@pytest.mark.parametrize("twist", TWISTS)
def test_another_gate_is_left_alone_and_says_why(twist: str) -> None:
    module, x = Twisted(twist), torch.randn(1, 6, 16)
    gm, result = raised(module, x)
    assert not called(gm, "dsmoe.route.default")
    (refusal,) = result.refused
    assert TWISTS[twist] in refusal.because, refusal.because


def test_group_scores_are_told_apart_even_when_traced_with_two_tokens() -> None:
    """With two rows to probe, sums of two and maxima pick the same groups by chance: the wrong gate was once taken."""
    changes, attributes = GATES["v3"]
    gm, _ = raised(Layer(**changes), torch.randn(1, 2, 16))
    (node,) = called(gm, "dsmoe.route.default")
    assert node.args[2:] == attributes
