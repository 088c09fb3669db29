"""Gates written as models write them: what each computes is found, what `dsmoe::route` cannot express is refused."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dsmoe_runtime.ops  # noqa: F401  registers the operators
from dsmoe_passes.canonicalise import canonicalise
from dsmoe_passes.fuse_moe import fuse_moe
from dsmoe_passes.match_router import match_router
from dsmoe_passes.result import PassResult
from tests.passes.loops import called, trace

E, K, H, WIDTH = 8, 2, 16, 8
ROUTE, MOE, EXPERTS = "dsmoe.route.default", "dsmoe.moe.default", "dsmoe.experts.default"
Routing = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """Experts as one operator behind the gate that `gate(self, x)` writes out: weights and ids `[T, K]`."""

    def __init__(self, gate: Callable[["Layer", Tensor], Routing]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) / shape[-1] ** 0.5)

        self.gate = gate
        self.router, self.wide = weight(E, H), weight(E + 1, H)
        self.router_bias, self.bias, self.factors = weight(E), weight(1, E), weight(E).abs()
        self.gate_up, self.down = weight(E, 2 * WIDTH, H), weight(E, H, WIDTH)
        self.one = weight(1)
        self.table = nn.Buffer(torch.randint(0, E, (9, K), generator=generator))

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.router)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, H)
        weights, experts = self.gate(self, flat)
        return torch.ops.dsmoe.experts(
            flat, experts, weights, self.gate_up, self.down, None, None, "silu", 0.0, 0.0, "concat"
        )


def renormalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def cast_back(m: Layer, x: Tensor) -> Routing:
    weights, experts = F.softmax(m.logits(x), dim=-1, dtype=torch.float).topk(K)
    return renormalised(weights).to(x.dtype), experts


def router_bias(m: Layer, x: Tensor) -> Routing:
    weights, experts = F.linear(x, m.router, m.router_bias).topk(K)
    return weights.softmax(1, dtype=weights.dtype), experts


def selected_then_softmax_of_all(m: Layer, x: Tensor) -> Routing:
    logits = m.logits(x).float()
    experts = logits.topk(K).indices
    return logits.softmax(-1).gather(1, experts), experts


def after_top_k_like_x(m: Layer, x: Tensor) -> Routing:
    weights, experts = m.logits(x).float().topk(K)
    return weights.softmax(-1).type_as(x), experts


def clamped_sum(m: Layer, x: Tensor) -> Routing:
    scores = F.linear(x.float(), m.router.float()).softmax(-1)
    experts = (scores + m.bias.squeeze()).topk(K).indices
    weights = scores.gather(1, experts)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-12), experts


def divided(m: Layer, x: Tensor) -> Routing:
    weights, experts = F.linear(x.float(), m.router.float()).sigmoid().topk(K)
    return weights / 4, experts


def groups_masked(m: Layer, x: Tensor, value: float, bias: bool) -> Routing:
    scores = m.logits(x).float().sigmoid()
    choice = scores + m.bias[0].float() if bias else scores
    groups = choice.view(-1, 4, 2).topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1, sorted=False)[1]
    mask = torch.zeros(x.shape[0], 4).scatter_(1, groups, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, E)
    experts = choice.masked_fill(~mask.bool(), value).topk(K, sorted=False)[1]
    weights = scores.gather(1, experts)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * 2.5, experts


def root_of_softplus(m: Layer, x: Tensor) -> Routing:
    scores = F.softplus(m.logits(x).float()).sqrt()
    experts = (scores + m.bias[0]).topk(K, sorted=False).indices
    weights = scores.gather(1, experts)
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) * 1.5, experts


SOFTMAX = (K, "softmax", 1, 1, "max")
FUSED: dict[str, tuple[Callable[[Layer, Tensor], Routing], tuple]] = {
    "cast back": (cast_back, (*SOFTMAX, True, 0.0, 1.0)),
    "router bias": (router_bias, (K, "softmax_after_topk", 1, 1, "max", False, 0.0, 1.0)),
    "softmax of all": (selected_then_softmax_of_all, (*SOFTMAX, False, 0.0, 1.0)),
    "after top-k, like x": (after_top_k_like_x, (K, "softmax_after_topk", 1, 1, "max", False, 0.0, 1.0)),
    "clamped sum": (clamped_sum, (*SOFTMAX, True, 1e-20, 1.0)),
    "divided": (divided, (K, "sigmoid", 1, 1, "max", False, 0.0, 0.25)),
    "groups, masked with 0, all positive": (
        lambda m, x: groups_masked(m, x, 0.0, bias=False),
        (K, "sigmoid", 4, 2, "top2", True, 1e-20, 2.5),
    ),
    "groups, masked with -inf": (
        lambda m, x: groups_masked(m, x, float("-inf"), bias=True),
        (K, "sigmoid", 4, 2, "top2", True, 1e-20, 2.5),
    ),
    "root of softplus": (root_of_softplus, (K, "sqrtsoftplus", 1, 1, "max", True, 1e-6, 1.5)),
}


def raised(module: nn.Module, x: Tensor) -> tuple[fx.GraphModule, PassResult, PassResult]:
    gm = trace(module, x, dim=1)
    canonicalise(gm)
    results = match_router(gm), fuse_moe(gm)
    gm.graph.lint()
    gm.recompile()
    return gm, *results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", FUSED)
def test_a_gate_of_any_spelling_is_fused(gate: str, dtype: torch.dtype) -> None:
    write, attributes = FUSED[gate]
    module, x = Layer(write).to(dtype), torch.randn(1, 6, H, dtype=dtype)
    gm, routed, fused = raised(module, x)
    assert (routed.refused, fused.refused) == ((), ())
    (node,) = called(gm, MOE)
    assert node.args[4:12] == attributes
    scored = router_bias is write and dtype is not torch.float32
    assert node.args[12] == ("activation" if scored else "float32")
    assert (node.args[2] is not None) == (gate == "router bias")
    x = torch.randn(1, 40, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    error = (gm(x).double() - module(x).double()).norm(dim=-1) / module(x).double().norm(dim=-1)
    assert error.median() <= 4 * torch.finfo(dtype).eps


def soft_capped(m: Layer, x: Tensor) -> Routing:
    weights, experts = (torch.tanh(m.logits(x).float() / 3) * 3).sigmoid().topk(K)
    return renormalised(weights), experts


def clamped_logits(m: Layer, x: Tensor) -> Routing:
    return m.logits(x).clamp(-15.0, 15.0).softmax(-1).topk(K)  # type: ignore[return-value]


def factor_of_each_expert(m: Layer, x: Tensor) -> Routing:
    weights, experts = m.logits(x).float().softmax(-1).topk(K)
    return renormalised(weights) * m.factors[experts], experts


def learnt_factor(m: Layer, x: Tensor) -> Routing:
    weights, experts = m.logits(x).float().sigmoid().topk(K)
    return weights * m.one.float(), experts


def masked_tokens(m: Layer, x: Tensor) -> Routing:
    weights, experts = m.logits(x).float().softmax(-1).topk(K)
    return weights * (x[:, :1] > 0), experts


def other_slots(m: Layer, x: Tensor) -> Routing:
    weights, experts = m.logits(x).float().softmax(-1).topk(K)
    return weights.flip(-1), experts


APART = {
    "clamped logits": (clamped_logits, "softmax", "the logits come from aten.clamp.default"),
    "soft cap": (soft_capped, "sigmoid", "the logits come from aten.mul.Tensor"),
    "factor of each expert": (factor_of_each_expert, "softmax", "not the gate's own weights"),
    "learnt factor": (learnt_factor, "sigmoid", "not the gate's own weights"),
    "masked tokens": (masked_tokens, "softmax", "not the gate's own weights"),
    "weights of other slots": (other_slots, "softmax", "not the gate's own weights"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", APART)
def test_what_surrounds_a_gate_stays_and_keeps_the_two_operators_apart(gate: str, dtype: torch.dtype) -> None:
    write, score, because = APART[gate]
    module, x = Layer(write).to(dtype), torch.randn(1, 6, H, dtype=dtype)
    gm, routed, fused = raised(module, x)
    assert not routed.refused
    (refusal,) = fused.refused
    assert because in refusal.because
    (route,) = called(gm, ROUTE)
    assert route.args[3] == score
    assert len(called(gm, EXPERTS)) == 1
    x = torch.randn(1, 40, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    error = (gm(x).double() - module(x).double()).norm(dim=-1) / module(x).double().norm(dim=-1).clamp_min(1e-6)
    assert error.max() <= 4 * torch.finfo(dtype).eps


def by_table(m: Layer, x: Tensor) -> Routing:
    experts = m.table[x[:, 0].long().clamp(0, 8)]
    return renormalised(m.logits(x).sigmoid().gather(1, experts)), experts


def by_logit(m: Layer, x: Tensor) -> Routing:
    weights, experts = m.logits(x).topk(K)
    return renormalised(weights.sigmoid()), experts


def with_noise(m: Layer, x: Tensor) -> Routing:
    logits = m.logits(x)
    return (logits + torch.rand_like(logits)).softmax(-1).topk(K)  # type: ignore[return-value]


def one_logit_more(m: Layer, x: Tensor) -> Routing:
    return F.linear(x, m.wide).softmax(-1)[:, :E].topk(K)  # type: ignore[return-value]


def rounded(m: Layer, x: Tensor) -> Routing:
    return (m.logits(x).softmax(-1) * 64).round().topk(K)  # type: ignore[return-value]


def unordered_slots(m: Layer, x: Tensor) -> Routing:
    """The operator orders its slots by score: what goes by slots that are ordered otherwise cannot follow it."""
    weights, experts = m.logits(x).softmax(-1).topk(K)
    return weights.flip(-1) * torch.tensor([1.0, 0.5]), experts.flip(-1)


def top_of_three(m: Layer, x: Tensor) -> Routing:
    experts = m.logits(x).softmax(-1).topk(K + 1).indices[:, 1:]
    return m.logits(x).softmax(-1).gather(1, experts), experts


def bias_weighs(m: Layer, x: Tensor) -> Routing:
    return (m.logits(x).softmax(-1) + m.bias[0]).topk(K)  # type: ignore[return-value]


def margin(m: Layer, x: Tensor) -> Routing:
    logits = m.logits(x)
    experts = logits.topk(K).indices
    kept = logits.masked_fill(logits.amax(-1, keepdim=True) - logits > 1.0, float("-inf"))
    return kept.softmax(-1).gather(1, experts), experts


SAME_EXPERTS = "selects the same experts, but none gives the same weights"
REFUSED: dict[str, tuple[Callable[[Layer, Tensor], Routing], str]] = {
    "groups, masked with 0": (lambda m, x: groups_masked(m, x, 0.0, bias=True), "are masked with 0 (masked_fill)"),
    "table": (by_table, "the expert ids are looked up in"),
    "by logit": (by_logit, "selected by their logits and weighed by sigmoid"),
    "noise": (with_noise, "the gate draws random numbers (aten.rand_like.default)"),
    "one logit more": (one_logit_more, "logits must have shape [T, 8], one for each routed expert, got"),
    "rounded": (rounded, "no gate of dsmoe::route gives the same ids and weights"),
    "weights of other slots": (unordered_slots, "beside the logits the gate reads"),
    "second and third": (top_of_three, "come from the GEMMs linear, linear_1"),
    "bias weighs": (bias_weighs, SAME_EXPERTS),
    "margin": (margin, SAME_EXPERTS),
}


@pytest.mark.parametrize("gate", REFUSED)
def test_another_gate_is_left_alone_and_says_why(gate: str) -> None:
    write, because = REFUSED[gate]
    module, x = Layer(write).bfloat16(), torch.randn(1, 6, H, dtype=torch.bfloat16)
    gm, routed, _ = raised(module, x)
    (refusal,) = routed.refused
    assert because in refusal.because, refusal.because
    assert refusal.node in {node.name for node in gm.graph.nodes}
    assert not called(gm, ROUTE)
    assert len(called(gm, EXPERTS)) == 1
    if gate != "noise":
        assert torch.equal(gm(x), module(x))


@pytest.mark.parametrize("tokens", [1, 5, 8, 16])
def test_a_mask_of_zeros_is_refused_whatever_the_trace(tokens: int) -> None:
    """A bias drawn once was positive enough in some traces for zeros to lose like -inf: the gate was then taken."""
    module, x = Layer(lambda m, x: groups_masked(m, x, 0.0, bias=True)), torch.randn(1, tokens, H)
    gm = torch.export.export(module, (x,), strict=False).module(check_guards=False)
    (refusal,) = match_router(gm).refused
    assert "which wins against a negative score plus bias" in refusal.because
