"""Searches plans of the routed experts for one that beats the plan in use beyond the noise, with equal results.

First the best plan of each kind that the cost model proposes, then the tiles of the best kind one kernel at a time,
then the model's blind spots, then a final. Samples are taken in turn; nothing here knows a GPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dsmoe_compiler.compare.timing import quantile
from dsmoe_runtime.errors import TargetError

if TYPE_CHECKING:
    from dsmoe_runtime.kernels.gpu import Device
    from dsmoe_runtime.kernels.plan import Plan, Shape

log = logging.getLogger(__name__)

LEAST_GAIN = 0.02
NOISE_FACTOR = 2.0  # times the noise by which a winner must lead
SLOWER = 1.5  # times the best that the model must not predict for a kind of plan to be tried
CLOSE = 1.10  # times the best measured up to which a second kind of plan is looked into
QUICK, FINAL = 4, 15  # samples


class Bench(Protocol):
    """What runs plans: `dsmoe_compiler.trial.Trial`."""

    def warm(self, plans: Sequence[Plan]) -> dict[Plan, str]: ...
    def seconds(self, plan: Plan) -> float: ...
    def forget(self, plan: Plan) -> None: ...
    def disagreement(self, plan: Plan, incumbent: Plan) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number of tokens. `tuned` is the fastest plan found, `kept` whether it takes the incumbent's place."""

    shape: Shape
    incumbent: Plan
    incumbent_us: float
    tuned: Plan
    tuned_us: float
    kept: bool
    why: str
    tried: int
    seconds: float

    @property
    def gain(self) -> float:
        """Share of the incumbent's time that the tuned plan saves."""
        return 1 - self.tuned_us / self.incumbent_us

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gain": self.gain}


class Search:
    """The plans of one cell, what they took and which failed; nothing new begins after `end`."""

    def __init__(self, bench: Bench, end: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.bench, self.end, self.clock = bench, end, clock
        self.samples: dict[Plan, list[float]] = {}
        self.failed: dict[Plan, str] = {}

    @property
    def over(self) -> bool:
        return self.clock() >= self.end

    def try_all(self, plans: Iterable[Plan]) -> None:
        """Compile and time those that have not been tried."""
        new = [plan for plan in dict.fromkeys(plans) if plan not in self.samples and plan not in self.failed]
        if not new or self.over:
            return
        self.fail(self.bench.warm(new))
        self.sample([plan for plan in new if plan not in self.failed], QUICK)

    def sample(self, plans: Sequence[Plan], repeats: int) -> None:
        """One of each in turn; the first round warms up. A plan that cannot run is set aside with its reason."""
        plans = list(plans)
        for round_ in range(repeats + 1):
            for plan in list(plans):
                if self.over and round_ > 1:
                    return
                try:
                    seconds = self.bench.seconds(plan)
                except torch.cuda.OutOfMemoryError as error:
                    self.fail({plan: f"out of memory: {str(error)[:100]}"})
                    plans.remove(plan)
                    continue
                if round_:
                    self.samples.setdefault(plan, []).append(seconds)

    def fail(self, reasons: Mapping[Plan, str]) -> None:
        for plan, reason in reasons.items():
            log.debug("%s: %s", plan, reason)
            self.samples.pop(plan, None)
        self.failed |= reasons

    def ranked(self) -> list[Plan]:
        """Fastest first."""
        return sorted(self.samples, key=lambda plan: median(self.samples[plan]))

    def prune(self, keep: Sequence[Plan]) -> None:
        """Give up the graphs of all but some."""
        for plan in self.samples.keys() - set(keep):
            self.bench.forget(plan)


def tune_cell(
    bench: Bench, shape: Shape, device: Device, end: float, *, clock: Callable[[], float] = time.monotonic
) -> Result:
    """Look for a plan that beats the one in use, until `end` of the clock.

    Raises: TargetError, if the plan in use cannot run or gives wrong answers.
    """
    from dsmoe_runtime.kernels.choose import candidates, choose, cuts, variations

    start = clock()
    incumbent, search = choose(shape, device), Search(bench, end, clock)
    search.try_all([incumbent, *kinds(candidates(shape, device), shape, device)])
    failure = search.failed.get(incumbent) or bench.disagreement(incumbent, incumbent)
    if failure:
        raise TargetError(f"{shape}: the plan in use does not work, so nothing is compared with it: {failure}")
    for leader in leaders(search):
        menus = [c for c in cuts(shape, leader.regime, device) if c[0][0].block_m == leader.up.block_m]
        for ups, downs in menus:
            search.try_all([replace(leader, up=up) for up in ups] + [replace(leader, down=down) for down in downs])
        search.try_all([combined(search, leader)])
        search.prune([incumbent, *search.ranked()[:4]])
    if search.samples:
        search.try_all(variations(shape, search.ranked()[0], device))
    return final(search, shape, incumbent, start)


def kinds(plans: Sequence[Plan], shape: Shape, device: Device) -> list[Plan]:
    """The first plan of each regime and height, those left out that the model finds far too slow."""
    from dsmoe_runtime.kernels.choose import predict

    first: dict[tuple[str, int, bool], Plan] = {}
    for plan in plans:
        first.setdefault((plan.regime, plan.up.block_m, plan.specialised), plan)
    best = min(predict(shape, plan, device) for plan in first.values())
    return [plan for plan in first.values() if predict(shape, plan, device) <= SLOWER * best]


def leaders(search: Search) -> list[Plan]:
    """The fastest plan with tiles to choose, and the fastest of another kind if it is close."""
    ranked = [plan for plan in search.ranked() if not plan.specialised]
    if not ranked:
        return []
    best = ranked[0]
    others = [p for p in ranked if (p.regime, p.up.block_m) != (best.regime, best.up.block_m)]
    limit = CLOSE * median(search.samples[best])
    return [best, *(plan for plan in others[:1] if median(search.samples[plan]) <= limit)]


def combined(search: Search, leader: Plan) -> Plan:
    """The best up with the best down of those tried beside the leader's own."""
    ranked = search.ranked()
    up = next((p.up for p in ranked if replace(p, up=leader.up) == leader), leader.up)
    down = next((p.down for p in ranked if replace(p, down=leader.down) == leader), leader.down)
    return replace(leader, up=up, down=down)


def final(search: Search, shape: Shape, incumbent: Plan, start: float) -> Result:
    """The incumbent against the two fastest that give equal answers, with samples of their own."""
    tried = len(search.samples)
    wrong = 0
    finalists = [incumbent]
    for plan in search.ranked():
        if len(finalists) == 3:
            break
        if plan == incumbent:
            continue
        reason = search.bench.disagreement(plan, incumbent)
        if reason is None:
            finalists.append(plan)
        else:
            wrong += 1
            log.warning("%s: %s gives other results and is left out: %s", shape, plan, reason)
    search.prune(finalists)
    # The last samples are taken even when time is up: it is they that decide.
    closing = Search(search.bench, float("inf"), search.clock)
    closing.sample(finalists, FINAL)
    taken = closing.samples
    tuned = min(taken, key=lambda plan: median(taken[plan]))
    kept, why = verdict(taken[incumbent], taken[tuned]) if tuned != incumbent else (False, "none was faster")
    return Result(
        shape=shape, incumbent=incumbent, incumbent_us=1e6 * median(taken[incumbent]), tuned=tuned,
        tuned_us=1e6 * median(taken[tuned]), kept=kept, why=why + (f"; {wrong} gave other results" if wrong else ""),
        tried=tried, seconds=search.clock() - start,
    )  # fmt: skip


def verdict(incumbent: Sequence[float], tuned: Sequence[float]) -> tuple[bool, str]:
    """Whether the tuned plan wins by enough, and why, in words. Samples of one round stand at the same place.

    A round's two samples share what the clock and other loads did to that round, so the noise is that of their
    difference: the distance between its quartiles.
    """
    leads = [a - b for a, b in zip(incumbent, tuned, strict=True)]
    lead, noise = median(leads), quantile(leads, 0.75) - quantile(leads, 0.25)
    gain = lead / median(incumbent)
    if gain < LEAST_GAIN:
        return False, f"{100 * gain:.1f} % is less than {100 * LEAST_GAIN:.0f} %"
    if lead <= NOISE_FACTOR * noise:
        return (
            False,
            f"a lead of {1e6 * lead:.1f} us is within {NOISE_FACTOR:g} times the noise of {1e6 * noise:.1f} us",
        )
    return True, f"{100 * gain:.1f} % faster, noise {100 * noise / median(incumbent):.1f} %"
