"""What a comparison found: plain, frozen values that the table, the JSON file and the report are made of."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dsmoe_compiler.compare.load import LayerLoad
from dsmoe_compiler.compare.memory import Memory
from dsmoe_compiler.compare.roofline import Roof, Work
from dsmoe_compiler.compare.timing import Samples
from dsmoe_runtime.agreement import Agreement, RoutingAgreement


@dataclass(frozen=True, kw_only=True)
class BatchEffect:
    """The same tokens computed in one call and one by one: kernels may sum in another order, so bits may differ.

    `flips` of `tokens` x layers chose another set of experts; `error` is the relative difference of the last logits.
    """

    tokens: int
    flips: int
    error: float


@dataclass(frozen=True, kw_only=True)
class CandidateAgreement:
    """Whether a candidate computes the same model: values against float64 at the candidate's own routing, routing by
    the gap of the float64 scores, both within what rounding does to eager in the same dtype.

    `errors` are the relative errors of each row of logits, `eager_errors` those of eager at the same routing.
    """

    ok: bool
    values: Agreement
    routing: tuple[RoutingAgreement, ...]
    routing_reported: bool
    errors: tuple[float, ...]
    eager_errors: tuple[float, ...]
    greedy_equal: int
    repeatable: bool
    batch_effect: BatchEffect | None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One candidate at one point. `phase` "prefill": `tokens` new tokens per sequence into an empty cache, seconds per
    call; "decode": one token per sequence after `context` others, seconds per step (mean of a block of steps).

    `speedup` is eager's median over this one's, `roofline_share` the least time possible over this median.
    `skipped` gives the reason where nothing was measured.
    """

    phase: str
    tokens: int
    context: int
    samples: Samples | None
    tokens_per_second: float | None = None
    speedup: float | None = None
    roofline_share: float | None = None
    memory: Memory | None = None
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class CandidateReport:
    """`state`: "measured", "disagrees" (checked and refused, hence not timed), "absent" or "failed", with `reason`.

    `break_even_tokens`: decoded tokens after which compiling has paid for itself against eager; None if never or
    if the gain is within the noise of the samples.
    """

    name: str
    title: str
    state: str
    reason: str | None = None
    note: str | None = None
    compile_seconds: float | None = None
    break_even_tokens: int | None = None
    agreement: CandidateAgreement | None = None
    measurements: tuple[Measurement, ...] = ()

    def at(self, phase: str, tokens: int) -> Measurement | None:
        """The measurement of `phase` at `tokens`, None if it is not there or was skipped."""
        return next(
            (m for m in self.measurements if m.phase == phase and m.tokens == tokens and m.samples is not None), None
        )


@dataclass(frozen=True, kw_only=True)
class PhaseWork:
    """What the roofline allows for one point, with the experts that this input really hit in each layer."""

    phase: str
    tokens: int
    context: int
    distinct: tuple[int, ...]
    work: Work


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that `dsmoe compare` found out; `to_dict()` is its JSON."""

    model: str
    dtype: str
    target: str
    batch_size: int
    parameters: int
    tokens: tuple[int, ...]
    decode_context: int
    decode_steps: int
    repeats: int
    inputs: str
    candidates: tuple[CandidateReport, ...]
    roof: Roof
    work: tuple[PhaseWork, ...]
    load: tuple[LayerLoad, ...]
    layers: tuple[dict[str, Any], ...]
    verification: dict[str, Any] | None
    environment: dict[str, str]

    @property
    def ok(self) -> bool:
        """Ours took part, agrees and was measured."""
        return self.candidate("dsmoe").state == "measured"

    @property
    def unstable(self) -> bool:
        """Some result spread so far that small differences mean nothing."""
        return any(m.samples.unstable for c in self.candidates for m in c.measurements if m.samples is not None)

    def candidate(self, name: str) -> CandidateReport:
        """Raises ValueError naming those there are."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise ValueError(f"no candidate {name!r}; there are {', '.join(c.name for c in self.candidates)}")

    def headline(self) -> str:
        """The result in one or two sentences, whichever way it went."""
        ours = self.candidate("dsmoe")
        if ours.state != "measured":
            return f"No result for dsmoe ({ours.state}): {ours.reason}"
        sentences = [_against(self, ours, "decode", 1, "Decodes")]
        if self.tokens:
            longest = max(self.tokens)
            sentences.append(_against(self, ours, "prefill", longest, f"prefills {longest} tokens"))
        return "; ".join(sentence for sentence in sentences if sentence) + "."

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and infinities become None."""
        return {
            "format": "dsmoe-comparison-1",
            "headline": self.headline(),
            "ok": self.ok,
            "unstable": self.unstable,
            **_finite(asdict(self)),
        }


def _against(comparison: Comparison, ours: CandidateReport, phase: str, tokens: int, what: str) -> str:
    mine = ours.at(phase, tokens)
    if mine is None or mine.samples is None:
        return ""
    parts: list[str] = []
    for other in comparison.candidates:
        theirs = other.at(phase, tokens)
        if other is not ours and theirs is not None and theirs.samples is not None:
            ratio = theirs.samples.median / mine.samples.median
            parts.append(f"{ratio:.1f}x {'' if parts else 'as fast as '}{other.title}")
    return f"{what} {_listing(parts)}" if parts else ""


def _listing(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
