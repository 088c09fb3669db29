"""dsmoe::route: the oracle's gate, ties, NaN, groups, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from dsmoe_model.errors import ConfigError
from dsmoe_runtime.errors import InputError
from dsmoe_runtime.ops.route import weights_of
from tests.runtime.op_cases import GATES, layer_of, normal, small_config

NAN, INF = float("nan"), float("inf")


def route(logits, bias=None, top_k=3, score="softmax", n_group=1, topk_group=1, group_score="max", **changes):
    end = {"renormalize": False, "eps": 1e-20, "scale": 1.0} | changes
    return torch.ops.dsmoe.route(logits, bias, top_k, score, n_group, topk_group, group_score, *end.values())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_agrees_with_the_oracle_to_the_bit(gate, dtype):
    config = small_config(**GATES[gate])
    router = layer_of(config, dtype).router
    x = normal(63, config.hidden_size, seed=5, dtype=dtype)
    routing = router(x)
    router_dtype = torch.float32 if config.router_dtype == "float32" else dtype
    logits = torch.nn.functional.linear(x.to(router_dtype), router.weight.to(router_dtype))
    weights, experts = route(
        logits,
        router.e_score_correction_bias,
        config.num_experts_per_tok,
        config.scoring_func,
        config.n_group,
        config.topk_group,
        config.group_score,
        renormalize=config.norm_topk_prob,
        eps=config.norm_eps,
        scale=config.routed_scaling_factor,
    )
    assert weights.dtype == torch.float32
    assert experts.dtype == torch.int64
    assert torch.equal(experts, routing.experts_TK)
    assert torch.equal(weights, routing.weights_TK)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk"])
@pytest.mark.parametrize("num_experts", [3, 12, 160])
def test_ties_go_to_the_lowest_index(score, num_experts):
    """Row 5: all-equal rows; torch.topk gives other indices from E = 17 or so on."""
    _, experts = route(torch.zeros(4, num_experts), score=score)
    assert experts.tolist() == [[0, 1, 2]] * 4
    _, experts = route(torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0]]), score=score)
    assert experts.tolist() == [[1, 3, 2]]


def test_tied_groups_go_to_the_lowest_index():
    _, experts = route(torch.zeros(1, 12), n_group=4, topk_group=2, top_k=5)
    assert experts.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("groups", [(1, 1, "max"), (4, 2, "max"), (4, 2, "top2")])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk"])
@pytest.mark.parametrize("bad", [[NAN] * 12, [INF] + [0.0] * 11, [-INF] * 12, [NAN] + [0.0] * 11, [INF, -INF, NAN] * 4])
def test_a_bad_row_keeps_ids_valid_and_other_rows_untouched(bad, score, groups):
    """Rows 6 and 7: whatever a row holds, its ids are distinct and in range; the rows beside it do not change a bit."""
    logits = normal(5, 12, seed=1)
    weights, experts = route(logits, None, 3, score, *groups)
    logits[2] = torch.tensor(bad)
    bad_weights, bad_experts = route(logits, None, 3, score, *groups)
    assert len(set(bad_experts[2].tolist())) == 3
    assert bad_experts.min() >= 0
    assert bad_experts.max() < 12
    others = [0, 1, 3, 4]
    assert torch.equal(bad_experts[others], experts[others])
    assert torch.equal(bad_weights[others], weights[others])
    if any(value != value for value in bad):
        assert bad_weights[2].isnan().any()


def test_bias_selects_but_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weights, experts = route(logits, torch.tensor([-9.0, 0.0, 0.0, 9.0]), 2, "sigmoid")
    assert experts.tolist() == [[3, 1]]
    assert torch.equal(weights[0], torch.sigmoid(logits[0, [3, 1]]))


def test_too_few_experts_in_the_kept_groups_are_filled_up_from_the_lowest():
    _, experts = route(torch.tensor([[0.0, 1.0, 5.0, 4.0, 2.0, 3.0]]), top_k=4, n_group=3, topk_group=1)
    assert experts.tolist() == [[2, 3, 0, 1]]


def test_one_token_more_does_not_change_the_others():
    logits = normal(9, 12, seed=2)
    whole = route(logits)
    for count in (0, 1, 4):
        part = route(logits[:count])
        assert all(torch.equal(p, w[:count]) for p, w in zip(part, whole, strict=True))


def test_weights_of_given_experts_are_those_of_route():
    logits = normal(9, 12, seed=3)
    for score in ("softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk"):
        weights, experts = route(logits, score=score, renormalize=True, scale=2.5)
        assert torch.equal(weights_of(logits, experts, score, True, 1e-20, 2.5), weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 13}, "top_k is 13 with 12 experts"),
        ({"top_k": 0}, "top_k is 0 with 12 experts"),
        ({"n_group": 5}, "n_group is 5 with 12 experts"),
        ({"n_group": 4, "topk_group": 5}, "topk_group is 5 with n_group 4"),
        ({"n_group": 12, "topk_group": 2, "group_score": "top2"}, "n_group is 12 with 12 experts"),
        ({"score": "tanh"}, "score is 'tanh'"),
        ({"group_score": "mean"}, "group_score is 'mean'"),
    ],
)
def test_impossible_gates_are_refused_with_both_values(changes, message):
    """Row 17, in the rule and in the fake."""
    with pytest.raises(ConfigError, match=message):
        route(torch.zeros(2, 12), **changes)
    with pytest.raises(ConfigError, match=message):
        route(torch.zeros(2, 12, device="meta"), **changes)


def test_wrong_tensors_are_refused():
    with pytest.raises(InputError, match=r"torch.int64 \(2, 12\)"):
        route(torch.zeros(2, 12, dtype=torch.int64))
    with pytest.raises(InputError, match=r"\(11,\) on cpu; the logits want \[12\] on cpu"):
        route(torch.zeros(2, 12), torch.zeros(11))
    with pytest.raises(InputError, match="on meta"):
        route(torch.zeros(2, 12), torch.zeros(12, device="meta"))
    gate = (3, "softmax", 1, 1, "max", False, 1e-20, 1.0)
    with pytest.raises(InputError, match=r"\(11,\) on cpu; the logits want \[12\] on cpu"):  # on the way to the kernels
        torch.ops.dsmoe.route.default._op_dk(torch._C.DispatchKey.CUDA, torch.zeros(2, 12), torch.zeros(11), *gate)
