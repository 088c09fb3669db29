"""The judge is judged: faithful results pass, small lies do not, and NaN buys nothing."""

from __future__ import annotations

import math

import pytest
import torch

from dsmoe_runtime.agreement import assert_within_budget, routing_agreement, row_error, selection_gap, within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matmul_case(dtype: torch.dtype, rows: int = 63) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(a faithful result, eager, exact) of one matmul with rms(exact) about 1; the two sum in another order."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 96, generator=generator, dtype=torch.float64).to(dtype)
    w = (torch.randn(96, 48, generator=generator, dtype=torch.float64) / 96**0.5).to(dtype)
    exact = x.double() @ w.double()
    assert rows == 0 or 0.1 < exact.square().mean().sqrt() < 10
    faithful = (x[:, 48:].float() @ w[48:].float() + x[:, :48].float() @ w[:48].float()).to(dtype)
    return faithful, x @ w, exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7, 63])
def test_a_faithful_result_passes(dtype: torch.dtype, rows: int) -> None:
    faithful, eager, exact = matmul_case(dtype, rows)
    assert within_budget(faithful, eager=eager, exact=exact).ok
    assert_within_budget(faithful, eager=eager, exact=exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lie",
    [
        lambda y: y * 0,
        lambda y: torch.cat([y[:-1], torch.full_like(y[-1:], math.nan)]),
        lambda y: torch.cat([y[:-1], torch.full_like(y[-1:], math.inf)]),
        lambda y: torch.cat([y[1:2], y[0:1], y[2:]]),
        lambda y: y * 1.02,
        lambda y: torch.cat([y[:-1], y[-1:] * 0]),
    ],
    ids=["zeros", "nan row", "inf row", "swapped rows", "x 1.02", "one row zero"],
)
def test_a_lie_is_caught(dtype: torch.dtype, lie) -> None:
    faithful, eager, exact = matmul_case(dtype)
    verdict = within_budget(lie(faithful), eager=eager, exact=exact)
    assert not verdict.ok
    assert verdict.rows_over >= 1
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(lie(faithful), eager=eager, exact=exact)


def test_the_worst_row_is_named_with_its_own_numbers() -> None:
    faithful, eager, exact = matmul_case(torch.float32)
    faithful[5] *= 1.5
    verdict = within_budget(faithful, eager=eager, exact=exact)
    assert (verdict.worst_row, verdict.rows_over, verdict.rows) == (5, 1, 63)
    assert verdict.worst == pytest.approx(0.5, rel=1e-3)
    assert verdict.budget < 1e-5
    assert str(verdict).startswith("row 5 is off by 5.00e-01, budget ")


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["actual", "eager", "exact"])
def test_poison_on_any_side_fails(poison: float, where: str) -> None:
    """An infinite eager error would be an infinite budget, a NaN one would compare as false both ways."""
    sides = dict(zip(("actual", "eager", "exact"), matmul_case(torch.float32), strict=True))
    sides[where][3, 3] = poison
    assert not within_budget(sides["actual"], eager=sides["eager"], exact=sides["exact"]).ok


def test_eager_is_judged_by_its_own_routing() -> None:
    """Without `exact_eager`, a row that eager routed elsewhere is a licence to be as wrong as that."""
    faithful, eager, exact = matmul_case(torch.float32)
    exact_eager = exact.clone()
    eager[4], exact_eager[4] = -eager[4], -exact[4]
    lie = faithful.clone()
    lie[4] = 0
    assert within_budget(lie, eager=eager, exact=exact).ok
    assert not within_budget(lie, eager=eager, exact=exact, exact_eager=exact_eager).ok
    assert within_budget(faithful, eager=eager, exact=exact, exact_eager=exact_eager).ok


def test_shapes_and_dtypes_must_match() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        row_error(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"float16.*float32"):
        within_budget(torch.ones(1, 2).half(), eager=torch.ones(1, 2), exact=torch.ones(1, 2).double())


def test_row_error_of_zeros_is_one() -> None:
    assert row_error(torch.zeros(2, 2, 3), torch.ones(2, 2, 3)).tolist() == [1.0] * 4


def test_gap_is_zero_or_less_for_a_top_k() -> None:
    scores = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    for k in (1, 4, 9):
        assert (selection_gap(scores.topk(k).indices, scores) <= 0).all()


def test_gap_measures_the_mistake() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.2]])
    assert selection_gap(torch.tensor([[1, 3]]), scores).item() == pytest.approx(0.1)
    assert selection_gap(torch.tensor([[0, 3]]), scores).item() == pytest.approx(0.4)


@pytest.mark.parametrize("experts", [[1, 1], [1, 4], [1, -1]])
def test_repeated_and_foreign_experts_have_no_excuse(experts: list[int]) -> None:
    assert selection_gap(torch.tensor([experts]), torch.ones(1, 4)).item() == math.inf


@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_groups_are_judged_before_experts(group_score: str) -> None:
    """Two groups of three, one may be used: expert 3 is better than 1 and 2, and still not a candidate."""
    scores = torch.tensor([[0.9, 0.2, 0.1, 0.5, 0.05, 0.04]])
    groups = {"n_group": 2, "topk_group": 1, "group_score": group_score}
    assert selection_gap(torch.tensor([[0, 1]]), scores, **groups).item() <= 0
    assert selection_gap(torch.tensor([[0, 2]]), scores, **groups).item() == pytest.approx(0.1)
    assert selection_gap(torch.tensor([[0, 3]]), scores, **groups).item() == math.inf  # two groups used
    expected = 0.4 if group_score == "max" else 0.55
    assert selection_gap(torch.tensor([[3, 4]]), scores, **groups).item() == pytest.approx(expected)


def routing_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(64, 33, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = logits.softmax(dim=-1)
    return logits.to(dtype).softmax(dim=-1), exact


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_excuses_flips_between_near_ties_only(dtype: torch.dtype) -> None:
    eager, exact = routing_case(dtype)
    chosen = exact.topk(4).indices
    verdict = routing_agreement(chosen, eager.topk(4).indices, exact_TE=exact, eager_TE=eager)
    assert verdict.ok
    assert verdict.mismatches == int((chosen.sort().values != eager.topk(4).indices.sort().values).any(-1).sum())
    wrong = chosen.clone()
    wrong[7, 3] = exact[7].argmin()
    verdict = routing_agreement(wrong, eager.topk(4).indices, exact_TE=exact, eager_TE=eager)
    assert not verdict.ok
    assert (verdict.worst_token, verdict.beyond_rounding) == (7, 1)
    assert "token 7" in str(verdict)


def test_the_order_within_a_set_is_no_mismatch() -> None:
    eager, exact = routing_case(torch.float32)
    chosen = exact.topk(4).indices
    assert routing_agreement(chosen.flip(-1), chosen, exact_TE=exact, eager_TE=eager).mismatches == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poisoned_scores_fail(poison: float) -> None:
    eager, exact = routing_case(torch.float32)
    chosen = exact.topk(4).indices
    eager[3, 3] = poison
    assert not routing_agreement(chosen, chosen, exact_TE=exact, eager_TE=eager).ok
    exact[3, 3] = math.nan
    assert not routing_agreement(chosen, chosen, exact_TE=exact, eager_TE=eager.nan_to_num()).ok


def test_no_tokens_agree() -> None:
    none = torch.zeros(0, 4, dtype=torch.int64)
    assert routing_agreement(none, none, exact_TE=torch.zeros(0, 9), eager_TE=torch.zeros(0, 9)).ok
