"""Time several candidates in turn (A B C A B C ...) and say how far the samples can be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

import torch

UNSTABLE_SPREAD = 0.20


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Seconds of every repeat, in the order they were taken, with their statistics.

    `spread` is (p90 - p10) / median; above `UNSTABLE_SPREAD` the result is `unstable`: another load on the machine or a
    changing clock took part in it, and small differences mean nothing.
    """

    seconds: tuple[float, ...]
    mean: float
    sd: float
    median: float
    p90: float
    spread: float
    unstable: bool

    @classmethod
    def of(cls, seconds: list[float]) -> Samples:
        """Summarise at least one sample; raises ValueError for none."""
        if not seconds:
            raise ValueError("no samples: repeats must be at least 1, got 0")
        middle, p90 = median(seconds), quantile(seconds, 0.9)
        spread = (p90 - quantile(seconds, 0.1)) / middle if middle > 0 else 0.0
        return cls(
            seconds=tuple(seconds),
            mean=fmean(seconds),
            sd=stdev(seconds) if len(seconds) > 1 else 0.0,
            median=middle,
            p90=p90,
            spread=spread,
            unstable=spread > UNSTABLE_SPREAD,
        )


def quantile(values: list[float], share: float) -> float:
    """Linear interpolation between the order statistics, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def stopwatch(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that `call` takes: CUDA events on a GPU, the performance counter elsewhere."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def captured(call: Callable[[], object], device: torch.device, *, warm: Callable[[], object], pool: Any = None) -> Any:
    """`call` as a CUDA graph, not yet replayed; `warm` runs first, beside the stream, and compiles what it must."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        warm()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph


def interleave(runs: Mapping[str, Callable[[], float]], *, repeats: int) -> dict[str, Samples]:
    """Run each once, then each again, `repeats` times: whatever disturbs the machine disturbs all of them alike.

    A run does its own preparation and returns the seconds that count. The first round is a warm-up and is not kept.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            seconds = run()
            if round_:
                taken[name].append(seconds)
    return {name: Samples.of(seconds) for name, seconds in taken.items()}
