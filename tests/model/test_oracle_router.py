"""Every gate against its rule written again, number by number, without tensors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_model.config import ModelConfig
from dsmoe_model.presets import PRESETS
from dsmoe_model.router import HashRouter, Router, Routing

BASE = replace(PRESETS["deepseek-moe-tiny"], hidden_size=20, n_routed_experts=12)
GATES = {
    "deepseek": {},
    "gshard": {"num_experts_per_tok": 2},
    "switch": {"num_experts_per_tok": 1},
    "all": {"num_experts_per_tok": 12},
    "renormalised": {"norm_topk_prob": True},
    "v2": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    "v3": {
        "scoring_func": "sigmoid",
        "selection_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "group_score": "top2",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "sqrtsoftplus": {"scoring_func": "sqrtsoftplus", "selection_bias": True, "norm_topk_prob": True},
    "gpt-oss": {"scoring_func": "softmax_after_topk"},
}


def gate(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Router:
    router = Router(config)
    torch.nn.init.normal_(router.weight, std=config.hidden_size**-0.5)
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.normal_()
    return router.to(dtype).requires_grad_(False)


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def by_hand(logits: list[float], bias: list[float], config: ModelConfig) -> tuple[list[int], list[float]]:
    """The rule in Python's own numbers: (experts best first, their weights)."""
    scores = {
        "softmax": softmax,
        "sigmoid": lambda values: [1 / (1 + math.exp(-v)) for v in values],
        "sqrtsoftplus": lambda values: [math.sqrt(math.log1p(math.exp(v))) for v in values],
        "softmax_after_topk": list,
    }[config.scoring_func](logits)
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(choice) // config.n_group
    groups = [choice[start : start + size] for start in range(0, len(choice), size)]
    strength = [max(g) if config.group_score == "max" else sum(sorted(g)[-2:]) for g in groups]
    kept = sorted(range(len(groups)), key=lambda g: (-strength[g], g))[: config.topk_group]
    allowed = [e for e in range(len(choice)) if e // size in kept]
    experts = sorted(allowed, key=lambda e: (-choice[e], e))[: config.num_experts_per_tok]
    weights = [scores[e] for e in experts]
    if config.scoring_func == "softmax_after_topk":
        weights = softmax(weights)
    if config.norm_topk_prob:
        weights = [w / (sum(weights) + config.norm_eps) for w in weights]
    return experts, [w * config.routed_scaling_factor for w in weights]


@pytest.mark.parametrize("name", GATES)
def test_gate_is_its_rule(name: str) -> None:
    torch.manual_seed(0)
    config = replace(BASE, **GATES[name])
    router = gate(config)
    x = torch.randn(40, 20, dtype=torch.float64)
    weights, experts, _ = router(x)
    bias = router.e_score_correction_bias
    for row, logits in enumerate((x @ router.weight.T).tolist()):
        wanted = by_hand(logits, [0.0] * 12 if bias is None else bias.tolist(), config)
        assert experts[row].tolist() == wanted[0]
        assert weights[row].tolist() == pytest.approx(wanted[1], rel=1e-12)


@pytest.mark.parametrize("name", GATES)
def test_ties_go_to_the_lowest_index(name: str) -> None:
    config = replace(BASE, **(GATES[name] | {"selection_bias": False}))
    experts = gate(config)(torch.zeros(3, 20, dtype=torch.float64)).experts_TK
    assert experts.tolist() == [list(range(config.num_experts_per_tok))] * 3


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(GATES)),
    rows=st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, 3e38]), min_size=0, max_size=4),
    data=st.data(),
)
def test_ids_stay_unique_and_in_range_whatever_the_row(name: str, rows: list[float], data: st.DataObject) -> None:
    router = gate(replace(BASE, **GATES[name]), torch.float32)
    x = torch.ones(len(rows) + 1, 20)
    for row, value in enumerate(rows):
        x[row, data.draw(st.integers(0, 19)) :] = value
    weights, experts, _ = router(x)
    assert all(len(set(ids)) == len(ids) and 0 <= min(ids) <= max(ids) < 12 for ids in experts.tolist())
    clean = router(torch.ones_like(x))  # the same shape: another one may take another order of summation
    assert torch.equal(weights[-1], clean.weights_TK[-1])
    assert torch.equal(experts[-1], clean.experts_TK[-1])
    assert all(weights[row].isnan().all() for row, value in enumerate(rows) if math.isnan(value))


def test_bias_chooses_but_never_weighs() -> None:
    router = gate(replace(BASE, selection_bias=True))
    x = torch.randn(5, 20, dtype=torch.float64)
    router.e_score_correction_bias = torch.zeros(12, dtype=torch.float64).index_fill(0, torch.tensor([11]), 9.0)
    weights, experts, scores = router(x)
    assert (experts[:, 0] == 11).all()
    assert torch.equal(weights, scores.gather(1, experts))


def test_a_masked_group_is_never_chosen_though_all_biases_are_negative() -> None:
    """DeepSeek's first V3 code masked by 0.0; with negative biases such an expert wins over every kept one."""
    config = replace(BASE, **GATES["v3"])
    router = gate(config)
    router.e_score_correction_bias = torch.full((12,), -0.8, dtype=torch.float64)
    experts = router(torch.randn(200, 20, dtype=torch.float64)).experts_TK
    assert max(len({e // 3 for e in ids}) for ids in experts.tolist()) <= config.topk_group


def test_forced_experts_keep_their_own_weights() -> None:
    router = gate(replace(BASE, **GATES["v3"]))
    x = torch.randn(5, 20, dtype=torch.float64)
    free = router(x)
    assert torch.equal(router(x, None, free.experts_TK).weights_TK, free.weights_TK)
    turned = router(x, None, free.experts_TK.flip(1))
    torch.testing.assert_close(turned.weights_TK, free.weights_TK.flip(1), rtol=1e-14, atol=0)


def test_the_gate_is_float32_unless_v1_is_asked_for() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 20).bfloat16()
    weight = gate(BASE, torch.bfloat16).weight

    def route(**changes: str) -> Routing:
        router = gate(replace(BASE, **changes), torch.bfloat16)
        router.weight.copy_(weight)
        return router(x)

    exact, rounded = route(), route(router_dtype="activation")
    assert exact.weights_TK.dtype == rounded.weights_TK.dtype == torch.float32
    assert exact.scores_TE.dtype == torch.float32
    assert torch.equal(exact.scores_TE, (x.float() @ weight.float().T).softmax(-1))
    assert rounded.scores_TE.dtype == torch.bfloat16
    assert torch.equal(rounded.weights_TK, rounded.weights_TK.bfloat16().float())


def test_casting_the_model_spares_the_selection_bias() -> None:
    router = gate(replace(BASE, selection_bias=True), torch.float32)
    before = router.e_score_correction_bias.clone()
    assert torch.equal(router.bfloat16().e_score_correction_bias, before)
    assert router.weight.dtype == torch.bfloat16
    assert router.double().e_score_correction_bias.dtype == torch.float64


def test_hash_layer_goes_by_token_id_with_weight_one() -> None:
    router = HashRouter(replace(PRESETS["hash-2b"], hidden_size=20))
    router.token_experts.copy_(torch.arange(8192)[:, None] % 16)
    ids = torch.tensor([[5, 5, 8191], [0, 16, 17]])
    weights, experts, scores = router(torch.randn(6, 20).bfloat16(), ids)
    assert experts.tolist() == [[5], [5], [15], [0], [0], [1]]
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[1.0]] * 6
    assert torch.equal(scores.argmax(-1, keepdim=True), experts)
    with pytest.raises(ValueError, match="token_ids"):
        router(torch.randn(6, 20))
