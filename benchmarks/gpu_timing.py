"""Timing on a GPU that no cache helps: CUDA graphs of calls on rotating data, in turn, within a budget of seconds.

A sample is the time of one replay over the number of calls in the graph. The calls of a graph differ in routing and,
where they touch little, in the copy of the weights, so that the L2 holds nothing that the next call wants. On a CPU
(`--device cpu`) the same code runs the calls one by one by the wall clock: a trial of the script, no measurement.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsmoe_compiler.compare.conditions import conditions
from dsmoe_compiler.compare.timing import Samples, captured, stopwatch

BANDWIDTH, MATRIX_RATE = 4.3e12, 788e12  # bytes/s of a copy and bf16 FLOP/s of a large product, measured on the H200
COLD_BYTES = 300e6  # five times the L2: what passes before the same weights come round again
SAMPLE_SECONDS = 4e-3  # a sample repeats its graph until it is about this long
WARM_SECONDS = 0.1  # until the clocks are up
REST_SECONDS = 0.03  # before a sample: long products drive the card into its power limit, which the next would pay for
RESULTS = Path(__file__).parent / "results"
Calls = Sequence[Callable[[], Any]]


class Replay:
    """Calls in a row, as one CUDA graph; with `graph` False, or on a CPU, as they are."""

    def __init__(self, calls: Calls, device: torch.device, *, graph: bool = True) -> None:
        self.calls, self.device, self.result = calls, device, None
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda" and graph:
            self.graph = captured(self._call, device, warm=self._call)

    def run(self) -> Any:
        """Once; the result of the last call."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._call()
        return self.result

    def _call(self) -> None:
        for call in self.calls:
            self.result = call()

    def seconds(self, rounds: int = 1) -> float:
        """Seconds a call, the mean over `rounds` replays."""

        def replays() -> None:
            for _ in range(rounds):
                self.run()

        return stopwatch(replays, self.device) / (rounds * len(self.calls))


def interleave(replays: Mapping[str, Replay], repeats: int, *, warm: int = 2) -> dict[str, list[float]]:
    """Seconds a call of each candidate, one sample in turn, `repeats` times; `warm` rounds and more do not count."""
    start, rounds, warmed = time.monotonic(), dict.fromkeys(replays, 1), 0
    on_gpu = any(replay.device.type == "cuda" for replay in replays.values())
    while warmed < warm or (replays and on_gpu and time.monotonic() - start < WARM_SECONDS):
        for name, replay in replays.items():
            whole = replay.seconds(rounds[name]) * len(replay.calls)
            rounds[name] = max(1, round(SAMPLE_SECONDS / max(whole, 1e-6))) if on_gpu else 1
        warmed += 1
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(repeats):
        for name, replay in replays.items():
            if on_gpu:
                time.sleep(REST_SECONDS)
            samples[name].append(replay.seconds(rounds[name]))
    return samples


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median, least, spread ((p90 - p10) / median) and all samples, in microseconds."""
    found = Samples.of(seconds)
    return {
        "median_us": 1e6 * found.median,
        "min_us": 1e6 * min(seconds),
        "spread": found.spread,
        "unstable": found.unstable,
        "samples_us": [round(1e6 * s, 3) for s in seconds],
    }


def roofline_seconds(size: float, flop: float) -> float:
    """The least time for so many bytes and products."""
    return max(size / BANDWIDTH, flop / MATRIX_RATE)


def poison(device: torch.device, *sizes: int) -> None:
    """Leave NaN in the memory that the next allocations of so many bytes get: an element left unwritten shows."""
    held = [torch.full((max(1, size // 4),), float("nan"), device=device) for size in sizes for _ in range(2)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    del held


def release(device: torch.device) -> None:
    """Give back what the last cell held: graphs, their pools, compiled functions."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def alive(device: torch.device) -> bool:
    """Whether the GPU still takes work: after an illegal access it takes none from this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def failure(error: BaseException) -> str:
    """An exception in one line, and the one before it: the end of a capture hides what broke it."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return text if error.__context__ is None else f"{text} (after {failure(error.__context__)})"[:900]


class Deadline:
    """Seconds of a budget that runs from now."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


class Session:
    """One run of a script: its record, written after every cell, its budget and its device.

    Cells are told apart by `key`, the names of their identifying fields.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, key: tuple[str, ...]) -> None:
        self.name, self.arguments, self.key = name, arguments, key
        self.device = torch.device(arguments.device)
        self.deadline = Deadline(arguments.budget)
        self.path = arguments.out or RESULTS / f"{name}_h200.json"
        self.record: dict[str, Any] = {"benchmark": name, "environment": conditions(self.device), "cells": []}
        self.record["roofline"] = {"bytes_per_second": BANDWIDTH, "flop_per_second": MATRIX_RATE}
        if (arguments.resume or arguments.update) and self.path.exists():
            self.record |= {k: v for k, v in json.loads(self.path.read_text()).items() if k not in self.record}
            self.record["cells"] = json.loads(self.path.read_text())["cells"]
        self.done = {self.identity(cell) for cell in self.record["cells"]} if arguments.resume else set()

    def identity(self, cell: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(cell.get(name) for name in self.key)

    def keep(self, cell: dict[str, Any]) -> None:
        """Take a cell, finished or not, in place of one with its key, and write the file."""
        cells = self.record["cells"]
        same = [i for i, old in enumerate(cells) if self.identity(old) == self.identity(cell)]
        if same:
            cells[same[0]] = cell
        else:
            cells.append(cell)
        self.write()

    def write(self) -> None:
        """The file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)

    def restart(self) -> int:
        """After a fault of the GPU: the cells that are left, in a new process, within what is left of the budget."""
        left = max(1, int(self.deadline.left))
        tell(f"the GPU takes no more work from this process: starting another one ({left} s left)")
        spec = [argument for argument in sys.argv[1:] if argument != "--update"]
        command = [sys.executable, "-m", f"benchmarks.{self.name}", *spec, "--resume", "--budget", str(left)]
        return subprocess.call(command)


def parser(caption: str, *, budget: int, repeats: int = 7) -> argparse.ArgumentParser:
    """The options that all GPU benchmarks share."""
    made = argparse.ArgumentParser(description=caption, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda", help="cuda, or cpu to try the script (with --out)")
    made.add_argument("--budget", type=int, default=budget, help=f"seconds for everything ({budget})")
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--candidates", nargs="+", help="only these")
    made.add_argument("--no-compile", dest="compile", action="store_false", help="stock candidates eager in the graph")
    made.add_argument("--disagreeing", action="store_true", help="time what does not agree too; it stays marked")
    made.add_argument("--out", type=Path, help="where to write (benchmarks/results/NAME_h200.json)")
    old = made.add_mutually_exclusive_group()
    old.add_argument("--resume", action="store_true", help="keep the file's cells and measure those that are missing")
    old.add_argument("--update", action="store_true", help="keep the file's cells but for those measured now")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, after the checks that need no GPU."""
    arguments = made.parse_args()
    if arguments.device == "cpu" and arguments.out is None:
        made.error("--device cpu is a trial, no result: say with --out where it goes")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch._dynamo")  # transformers' cached helpers
    return arguments


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def told(session: Session) -> None:
    """The last words of a run."""
    tell(f"wrote {session.path} after {session.arguments.budget - session.deadline.left:.0f} s: {shlex.join(sys.argv)}")
