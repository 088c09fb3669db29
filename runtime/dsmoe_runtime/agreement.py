"""Agreement with an oracle: values row by row within a budget taken from eager, routing by the gap between scores.

Values. A row (the last dimension) is judged by its relative distance from float64. The budget comes from data: eager,
the same function in the same dtype, is so far off, and we may be `factor` times as far; there is no absolute tolerance.
Routing must be the same on both sides of each comparison: where ours and eager's differ, each is measured against a
float64 result computed with its own experts (`exact` and `exact_eager`).

Routing. The experts of a token are a valid choice if no expert left out beats one that was chosen. By how much it does
is the *gap*; rounding excuses a gap as wide as eager's own scores are off, and nothing else does.

T tokens, E experts, K chosen per token, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 2.0


class Allowance(NamedTuple):
    """What rounding may cost, in terms of eager's row errors: `factor` times the one that `level` of them stay below.

    The median will do where most kernels are eager's own. Kernels of another library err as much as eager's but on
    other rows, and narrow rows err now and then by several medians: `OTHER_KERNELS` is for those.
    """

    factor: float = FACTOR
    level: float = 0.5


OWN_KERNELS, OTHER_KERNELS = Allowance(), Allowance(3.0, 0.95)


@dataclass(frozen=True)
class Agreement:
    """Verdict on the rows of a tensor; `worst` and `budget` are those of the row that uses most of its budget."""

    ok: bool
    worst_row: int | None
    worst: float
    budget: float
    rows_over: int
    rows: int

    def __str__(self) -> str:
        if self.worst_row is None:
            return "no rows"
        state = "" if self.ok else f"; {self.rows_over} of {self.rows} rows are over"
        return f"row {self.worst_row} is off by {self.worst:.2e}, budget {self.budget:.2e}{state}"


@dataclass(frozen=True)
class RoutingAgreement:
    """Verdict on the experts chosen.

    `gap` and `rounding` are those of `worst_token`, which uses most of its excuse; `widest_gap` is the largest between
    our choice and eager's, over the tokens where they are different sets.
    """

    ok: bool
    tokens: int
    mismatches: int
    beyond_rounding: int
    worst_token: int | None
    gap: float
    rounding: float
    widest_gap: float

    def __str__(self) -> str:
        text = f"{self.mismatches} of {self.tokens} tokens chose another set than eager"
        if self.ok or self.worst_token is None:
            return f"{text}; widest gap {self.widest_gap:.2e}" if self.mismatches else text
        return (
            f"{text}; token {self.worst_token} left out an expert that scores {self.gap:.2e} higher, rounding excuses "
            f"{self.rounding:.2e}; {self.beyond_rounding} of {self.tokens} tokens are beyond rounding"
        )


def row_error(actual: Tensor, exact: Tensor) -> Tensor:
    """Relative distance of each row of `actual` [..., D] from `exact` [..., D] -> float64 [rows].

    A row of zeros scores 1.0, a row with NaN or Inf scores NaN or Inf. Raises ValueError if the shapes differ.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"actual has shape {tuple(actual.shape)}, exact {tuple(exact.shape)}; they must be the same")
    actual_RD = actual.detach().double().reshape(-1, actual.shape[-1]) if actual.numel() else actual.new_zeros(0, 1)
    exact_RD = exact.detach().double().reshape(actual_RD.shape)
    size_R = exact_RD.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return (actual_RD.double() - exact_RD).norm(dim=-1) / size_R


def within_budget(
    actual: Tensor,
    *,
    eager: Tensor,
    exact: Tensor,
    exact_eager: Tensor | None = None,
    factor: float = FACTOR,
    level: float = 0.5,
) -> Agreement:
    """Judge `actual` [..., D] against `exact` (float64), with the budget that `eager` sets in the same dtype.

    Budget of a row: factor * max(median of eager's row errors, eager's error on that row) + eps / 2; another `level`
    than 0.5 takes that quantile for the median. `exact_eager` is the float64 value of eager's own routing, `exact` by
    default. NaN or Inf in any of them puts the row over budget.
    """
    if actual.dtype != eager.dtype:
        raise ValueError(f"actual is {actual.dtype}, eager {eager.dtype}; a budget needs eager in the same dtype")
    error_R = row_error(actual, exact)
    if error_R.numel() == 0:
        return Agreement(True, None, 0.0, 0.0, 0, 0)
    eager_R = row_error(eager, exact if exact_eager is None else exact_eager)
    eager_R = eager_R.masked_fill(eager_R.isinf(), math.nan)  # an infinite error must not buy an infinite budget
    usual = eager_R.quantile(level, interpolation="lower")
    budget_R = factor * torch.maximum(usual, eager_R) + torch.finfo(actual.dtype).eps / 2
    over_R = ~(error_R <= budget_R)
    row = int((error_R / budget_R).nan_to_num(nan=math.inf, posinf=math.inf).argmax())
    rows_over = int(over_R.sum())
    return Agreement(rows_over == 0, row, float(error_R[row]), float(budget_R[row]), rows_over, error_R.numel())


def assert_within_budget(
    actual: Tensor, *, eager: Tensor, exact: Tensor, exact_eager: Tensor | None = None, factor: float = FACTOR
) -> None:
    """`within_budget` for tests: raises AssertionError with the row, its error and its budget."""
    verdict = within_budget(actual, eager=eager, exact=exact, exact_eager=exact_eager, factor=factor)
    assert verdict.ok, f"{tuple(actual.shape)} {actual.dtype}: {verdict} ({factor:g} x eager + eps/2)"


def selection_gap(
    experts_TK: Tensor, selection_TE: Tensor, *, n_group: int = 1, topk_group: int = 1, group_score: str = "max"
) -> Tensor:
    """How far the best expert left out beats the worst one chosen -> float64 [T]; <= 0 for an exact top-k.

    `selection_TE` are the scores that decide (bias included, groups not yet masked). With groups (DeepSeek-V2 "max",
    V3 "top2") the same is asked of the groups first, and experts then compete within the groups that were used, filled
    up with the best others. Experts repeated or outside [0, E), or too many groups, have an infinite gap; NaN scores a
    NaN gap.
    """
    experts_TK, selection_TE = experts_TK.detach(), selection_TE.detach().double()
    n_tokens, n_experts = selection_TE.shape
    inside_TK = (experts_TK >= 0) & (experts_TK < n_experts)
    times_TE = torch.zeros_like(selection_TE).scatter_add_(
        1, experts_TK.clamp(0, n_experts - 1), inside_TK.to(selection_TE.dtype)
    )
    broken_T = ~inside_TK.all(dim=-1) | (times_TE > 1).any(dim=-1)
    chosen_TE = times_TE > 0
    candidates_TE, group_gap_T = torch.ones_like(chosen_TE), selection_TE.new_full((n_tokens,), -math.inf)
    if n_group > 1:
        grouped_TGM = selection_TE.view(n_tokens, n_group, -1)
        best = 2 if group_score == "top2" else 1
        score_TG = grouped_TGM.topk(best, dim=-1).values.sum(dim=-1)
        used_TG = chosen_TE.view(n_tokens, n_group, -1).any(dim=-1)
        kept_TG = torch.zeros_like(used_TG).scatter_(
            1, score_TG.masked_fill(used_TG, math.inf).topk(topk_group, dim=-1).indices, True
        )
        broken_T |= used_TG.sum(dim=-1) > topk_group
        group_gap_T = _gap(score_TG, kept_TG, ~kept_TG)
        candidates_TE = kept_TG.repeat_interleave(n_experts // n_group, dim=1)
    gap_T = torch.maximum(_gap(selection_TE, chosen_TE, candidates_TE & ~chosen_TE), group_gap_T)
    return gap_T.masked_fill(broken_T, math.inf).masked_fill(selection_TE.isnan().any(dim=-1), math.nan)


def _gap(score: Tensor, chosen: Tensor, left_out: Tensor) -> Tensor:
    best_left_out = score.masked_fill(~left_out, -math.inf).amax(dim=-1)
    return best_left_out - score.masked_fill(~chosen, math.inf).amin(dim=-1)


def routing_agreement(
    actual_TK: Tensor,
    eager_TK: Tensor,
    *,
    exact_TE: Tensor,
    eager_TE: Tensor,
    exact_eager_TE: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    factor: float = FACTOR,
) -> RoutingAgreement:
    """Judge the experts that `actual_TK` chose, and count the tokens whose set differs from `eager_TK`.

    `exact_TE` are the float64 selection scores at the place where `actual_TK` was chosen, `eager_TE` the scores that
    eager computed (float32 or lower), `exact_eager_TE` the float64 scores at eager's place, if that is another one. Two
    scores may pass each other when each moves, so rounding excuses 2 * factor * max(median, own) of eager's largest
    score error per token + eps of the largest score (twice that where a group's score is a sum of two). The order
    within a set is not judged here: weights, and so values, follow it.
    """
    n_tokens = actual_TK.shape[0]
    if n_tokens == 0:
        return RoutingAgreement(True, 0, 0, 0, None, 0.0, 0.0, 0.0)
    groups = {"n_group": n_group, "topk_group": topk_group}
    gap_T = selection_gap(actual_TK, exact_TE, **groups, group_score=group_score)
    reference_TE = (exact_TE if exact_eager_TE is None else exact_eager_TE).double()
    off_T = (eager_TE.double() - reference_TE).abs().amax(dim=-1)
    off_T = off_T.masked_fill(off_T.isinf(), math.nan)
    size_T = reference_TE.abs().amax(dim=-1)
    terms = 2 if n_group > 1 and group_score == "top2" else 1
    excused_T = terms * (2 * factor * torch.maximum(off_T.median(), off_T) + torch.finfo(eager_TE.dtype).eps * size_T)
    beyond_T = ~(gap_T <= excused_T)
    differ_T = (actual_TK.sort(dim=-1).values != eager_TK.sort(dim=-1).values).any(dim=-1)
    wide_T = torch.maximum(gap_T, selection_gap(eager_TK, exact_TE, **groups, group_score=group_score))
    token = int((gap_T / excused_T).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).argmax())
    beyond = int(beyond_T.sum())
    return RoutingAgreement(
        ok=beyond == 0,
        tokens=n_tokens,
        mismatches=int(differ_T.sum()),
        beyond_rounding=beyond,
        worst_token=token,
        gap=float(gap_T[token]),
        rounding=float(excused_T[token]),
        widest_gap=float(wide_T[differ_T].max()) if differ_T.any() else 0.0,
    )
