"""Before anything is timed: does a candidate compute the same model?

Each candidate runs the same fixed inputs twice. Its logits are judged against float64 *at the routing it chose*, with
a budget that eager sets at that same routing; its routing is judged by the float64 scores on the way. Where a candidate
does not report its routing, float64's own is used. The second run must give the same bits, and costs no compilation:
the time it saves is the compile time.

L layers with routed experts, B sequences, S positions, K experts per token, E experts, V vocabulary, N decode steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsmoe_compiler.compare.candidates import Candidate, HuggingFace
from dsmoe_compiler.compare.load import routed_layers
from dsmoe_compiler.compare.result import BatchEffect, CandidateAgreement
from dsmoe_compiler.verify.exact import float64_model
from dsmoe_model.router import HashRouter
from dsmoe_model.transformer import Transformer
from dsmoe_runtime.agreement import RoutingAgreement, routing_agreement, row_error, within_budget


@dataclass(frozen=True)
class Trace:
    """What a candidate computed: per call the ids it had seen by then, logits `[rows, V]`, experts `[L, B, S, K]`."""

    calls: list[tuple[Tensor, list[int], Tensor, Tensor | None]]
    decode_experts_LBNK: Tensor | None
    last_logits_BV: Tensor
    seconds: float

    def same_bits(self, other: Trace) -> bool:
        pairs = zip(self.calls, other.calls, strict=True)
        return all(_equal(a[2], b[2]) and _equal(a[3], b[3]) for a, b in pairs)


class Impossible(ValueError):
    """A routing that is none: float64 cannot even be asked for its values there."""


@dataclass
class Judge:
    """Float64 and eager values at a given routing, each computed once: most candidates choose alike."""

    model: Transformer
    known: dict[bytes, Place] = field(default_factory=dict)

    def judge(self, trace: Trace, again: Trace, batch_effect: BatchEffect | None) -> CandidateAgreement:
        """Verdict on `trace`; `again` is the same candidate on the same inputs. Raises Impossible."""
        actual, eager, exact, routings = [], [], [], []
        reported = all(experts is not None for *_, experts in trace.calls)
        for ids_BS, rows, logits_RV, experts_LBSK in trace.calls:
            if experts_LBSK is not None:
                self._check_possible(experts_LBSK, ids_BS)
            place = self._place(ids_BS, experts_LBSK)
            actual.append(logits_RV.float())
            eager.append(place.eager_BSV[:, rows].flatten(0, 1))
            exact.append(place.exact_BSV[:, rows].flatten(0, 1))
            if experts_LBSK is not None:
                routings.append(self._routing(place, experts_LBSK))
        actual_RV, eager_RV, exact_RV = torch.cat(actual), torch.cat(eager), torch.cat(exact)
        values = within_budget(actual_RV, eager=eager_RV, exact=exact_RV)
        routing = tuple(_merge(layer) for layer in zip(*routings, strict=True))
        return CandidateAgreement(
            ok=values.ok and all(layer.ok for layer in routing),
            values=values,
            routing=routing,
            routing_reported=reported,
            errors=tuple(row_error(actual_RV, exact_RV).tolist()),
            eager_errors=tuple(row_error(eager_RV, exact_RV).tolist()),
            greedy_equal=int((actual_RV.argmax(-1) == exact_RV.argmax(-1)).sum()),
            repeatable=trace.same_bits(again),
            batch_effect=batch_effect,
        )

    def _check_possible(self, experts_LBSK: Tensor, ids_BS: Tensor) -> None:
        n_experts, per_token = self.model.config.n_routed_experts, self.model.config.num_experts_per_tok
        if experts_LBSK.numel() == 0:
            return
        expected = (experts_LBSK.shape[0], *ids_BS.shape, per_token)
        if experts_LBSK.shape != expected:
            raise Impossible(f"experts have shape {tuple(experts_LBSK.shape)}, expected is {expected}")
        low, high = int(experts_LBSK.min()), int(experts_LBSK.max())
        if low < 0 or high >= n_experts:
            raise Impossible(f"expert ids run from {low} to {high}, there are experts 0 to {n_experts - 1}")

    def _place(self, ids_BS: Tensor, experts_LBSK: Tensor | None) -> Place:
        key = ids_BS.cpu().numpy().tobytes() + b"/"
        key += b"free" if experts_LBSK is None else experts_LBSK.cpu().numpy().tobytes()
        if key not in self.known:
            self.known[key] = self._compute(ids_BS, experts_LBSK)
        return self.known[key]

    def _compute(self, ids_BS: Tensor, experts_LBSK: Tensor | None) -> Place:
        float64, free = float64_model(self.model), self.model(ids_BS)
        if experts_LBSK is None:
            forced = [layer.experts_TK for layer in float64(ids_BS).routing]
        else:
            forced = [experts_BSK.flatten(0, 1) for experts_BSK in experts_LBSK]
        exact, eager = float64(ids_BS, experts=forced), self.model(ids_BS, experts=forced)
        return Place(
            ids_BS=ids_BS,
            exact_BSV=exact.logits_BSV,
            eager_BSV=eager.logits_BSV.float(),
            exact_scores=[layer.scores_TE for layer in exact.routing],
            eager_scores=[layer.scores_TE for layer in eager.routing],
            eager_choice=[layer.experts_TK for layer in free.routing],
        )

    def _routing(self, place: Place, experts_LBSK: Tensor) -> list[RoutingAgreement]:
        config, verdicts = self.model.config, []
        for index, layer in enumerate(routed_layers(self.model).values()):
            router = layer.router
            exact_TE, eager_TE = place.exact_scores[index], place.eager_scores[index]
            if isinstance(router, HashRouter):  # no scores: the table alone is right
                table_TK = router.token_experts[place.ids_BS.reshape(-1)]
                exact_TE = eager_TE = torch.zeros_like(exact_TE).scatter(1, table_TK, 1.0)
            elif router is not None and router.e_score_correction_bias is not None:
                exact_TE = exact_TE + router.e_score_correction_bias
                eager_TE = eager_TE + router.e_score_correction_bias
            verdicts.append(
                routing_agreement(
                    experts_LBSK[index].flatten(0, 1),
                    place.eager_choice[index],
                    exact_TE=exact_TE,
                    eager_TE=eager_TE,
                    n_group=config.n_group,
                    topk_group=config.topk_group,
                    group_score=config.group_score,
                )
            )
        return verdicts


@dataclass(frozen=True)
class Place:
    """Values at one input and one routing."""

    ids_BS: Tensor
    exact_BSV: Tensor
    eager_BSV: Tensor
    exact_scores: list[Tensor]
    eager_scores: list[Tensor]
    eager_choice: list[Tensor]


def run_trace(candidate: Candidate, ids_BS: Tensor, *, tokens: tuple[int, ...], context: int, steps: int) -> Trace:
    """Prefill each length that the candidate takes, then decode `steps` given tokens after `context` others."""
    calls: list[tuple[Tensor, list[int], Tensor, Tensor | None]] = []
    batch, begin = ids_BS.shape[0], time.perf_counter()
    with _watched(candidate), torch.no_grad():
        for length in tokens:
            if candidate.refuses(batch * length) is None:
                logits_BV, experts = candidate.prefill(ids_BS[:, :length], candidate.new_cache())
                calls.append((ids_BS[:, :length], [length - 1], logits_BV.clone(), _by_sequence(experts, batch)))
        cache = candidate.new_cache()
        logits_BV, experts = candidate.prefill(ids_BS[:, :context], cache)
        logits, chosen = [logits_BV.clone()], [_by_sequence(experts, batch)]
        for position in range(context, context + steps):
            logits_BV, experts = candidate.decode(ids_BS[:, position : position + 1], position, cache)
            logits.append(logits_BV.clone())
            chosen.append(_by_sequence(experts, batch))
    rows, known = list(range(context - 1, context + steps)), [experts for experts in chosen if experts is not None]
    experts_LBSK = torch.cat(known, dim=2) if len(known) == len(chosen) else None
    calls.append((ids_BS[:, : context + steps], rows, torch.stack(logits, dim=1).flatten(0, 1), experts_LBSK))
    if ids_BS.is_cuda:
        torch.cuda.synchronize(ids_BS.device)
    decoded = experts_LBSK[:, :, context:] if experts_LBSK is not None else None
    return Trace(calls, decoded, logits[-1], time.perf_counter() - begin)


def batch_effect(candidate: Candidate, ids_BS: Tensor, trace: Trace) -> BatchEffect | None:
    """The decoded tokens once more, all in one prefill: how far do experts and logits depend on the company kept?"""
    batch, length = ids_BS.shape
    if trace.decode_experts_LBNK is None or candidate.refuses(batch * length) is not None:
        return None
    with _watched(candidate), torch.no_grad():
        logits_BV, experts = candidate.prefill(ids_BS, candidate.new_cache())
    together, alone = _by_sequence(experts, batch), trace.decode_experts_LBNK
    if together is None:
        return None
    differ = together[:, :, length - alone.shape[2] :].sort(dim=-1).values != alone.sort(dim=-1).values
    return BatchEffect(
        tokens=alone.shape[1] * alone.shape[2],
        flips=int(differ.any(dim=-1).sum()),
        error=float(row_error(trace.last_logits_BV.float(), logits_BV.float()).max()),
    )


@contextmanager
def _watched(candidate: Candidate) -> Iterator[None]:
    if not isinstance(candidate, HuggingFace):
        yield
        return
    hooks = candidate.watch()
    try:
        yield
    finally:
        candidate.unwatch(hooks)


def _by_sequence(experts_LTK: Tensor | None, batch: int) -> Tensor | None:
    return None if experts_LTK is None else experts_LTK.clone().unflatten(1, (batch, -1))


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _merge(verdicts: tuple[RoutingAgreement, ...]) -> RoutingAgreement:
    """One layer over several calls: the verdict of the worst call, with tokens and mismatches summed."""
    worst = max(verdicts, key=lambda v: (v.beyond_rounding, math.inf if math.isnan(v.gap) else v.gap))
    return replace(
        worst,
        ok=all(v.ok for v in verdicts),
        tokens=sum(v.tokens for v in verdicts),
        mismatches=sum(v.mismatches for v in verdicts),
        beyond_rounding=sum(v.beyond_rounding for v in verdicts),
        widest_gap=max(v.widest_gap for v in verdicts),
    )
