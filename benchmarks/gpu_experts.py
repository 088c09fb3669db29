"""Routed experts on one H200, bf16: dsmoe::experts beside torch grouped_mm and transformers, cold, in CUDA graphs.

    python -m benchmarks.gpu_experts                                   5 shapes, 6 numbers of tokens
    python -m benchmarks.gpu_experts --warm 10                         compile all cells in 10 processes first
    python -m benchmarks.gpu_experts --shapes 16B --tokens 4096 --routing uniform skewed same --update

Ids and weights are given: no gate and no shared experts in these times. A candidate is timed after its rows agreed
with float64 (32 of them, poisoned memory). Each cell may take its share of what is left of the budget; ours comes
first, so that every cell has it. Results go to benchmarks/results/gpu_experts_h200.json after every cell.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_candidates as candidates
from benchmarks.gpu_shapes import SHAPES, TOKENS, Shape
from benchmarks.gpu_timing import (
    COLD_BYTES,
    Deadline,
    Replay,
    Session,
    alive,
    failure,
    interleave,
    parsed,
    parser,
    poison,
    release,
    roofline_seconds,
    summary,
    tell,
    told,
)
from dsmoe_runtime.agreement import within_budget

DTYPE = torch.bfloat16
ROWS = 32  # sampled for agreement
GATHER_LIMIT = 8e9  # bytes of weights that transformers' batched_mm may copy


class Problem:
    """One cell's data: x, as many routings as the graph has calls, and copies of the weights to rotate over."""

    def __init__(self, shape: Shape, tokens: int, routing: str, device: torch.device, *, calls: int) -> None:
        self.shape, self.tokens, self.device = shape, tokens, device
        generator = torch.Generator(device).manual_seed(tokens)
        draw = candidates.ROUTINGS[routing]
        self.x = torch.randn(tokens, shape.hidden, generator=generator, device=device).to(DTYPE)
        self.ids = [draw(tokens, shape.experts, shape.top_k, generator) for _ in range(calls)]
        if tokens == 1 and routing == "uniform":  # the same distribution, and neighbours have no expert in common
            order = torch.randperm(shape.experts, generator=generator, device=device)
            blocks = [part for part in order.split(shape.top_k) if len(part) == shape.top_k]
            self.ids = [blocks[i % len(blocks)][None].clone() for i in range(calls)]
        self.weights = [candidates.routing_weights(ids, generator) for ids in self.ids]
        self.distinct = sum(ids.unique().numel() for ids in self.ids) / calls
        self.copies = max(1, math.ceil(COLD_BYTES / (self.distinct * shape.expert_bytes)))
        if device.type == "cpu":
            self.copies = min(self.copies, 2)

    def rows(self) -> tuple[list[tuple[int, Tensor]], Tensor, Tensor, Tensor]:
        """Which rows of which call are looked at, and their x, ids and weights joined."""
        calls = min(len(self.ids), max(1, min(4, ROWS // self.tokens)))
        count = min(self.tokens, ROWS // calls)
        chosen = torch.linspace(0, self.tokens - 1, count, device=self.device).long()
        picked = [(call, chosen) for call in range(calls)]
        return (
            picked,
            torch.cat([self.x[rows] for _, rows in picked]),
            torch.cat([self.ids[call][rows] for call, rows in picked]),
            torch.cat([self.weights[call][rows] for call, rows in picked]),
        )


def functions(shape: Shape, tokens: int, *, compiled: bool) -> dict[str, Callable[[], candidates.Experts]]:
    """How each candidate is made for a cell; compilation itself happens in its first call."""

    def stock(function: candidates.Experts) -> candidates.Experts:
        return torch.compile(function, dynamic=False) if compiled else function

    def huggingface(name: str) -> candidates.Experts:
        return stock(candidates.transformers_experts(name, shape.experts, shape.hidden, shape.width))

    made: dict[str, Callable[[], candidates.Experts]] = {
        "dsmoe": lambda: candidates.dsmoe,
        "grouped_mm": lambda: stock(candidates.grouped_mm),
        "transformers grouped_mm": lambda: huggingface("grouped_mm"),
    }
    if tokens <= 64 and tokens * shape.top_k * shape.expert_bytes <= GATHER_LIMIT:
        made["transformers batched_mm"] = lambda: huggingface("batched_mm")
    return made


class Cell:
    """One shape, number of tokens and routing: the candidates prepared one by one, then timed in turn."""

    def __init__(self, name: str, problem: Problem, routing: str, stacks: list[tuple[Tensor, Tensor]]) -> None:
        self.problem, self.stacks = problem, stacks
        self.replays: dict[str, Replay] = {}
        shape, tokens = problem.shape, problem.tokens
        size, flop = shape.size(problem.distinct, tokens), shape.flop(tokens)
        known = routing == "uniform" and tokens in TOKENS and bool(shape.goal)
        self.record: dict[str, Any] = {
            "shape": name,
            "tokens": tokens,
            "routing": routing,
            **{field: getattr(shape, field) for field in ("hidden", "width", "experts", "top_k")},
            "distinct_experts": problem.distinct,
            "bytes": size,
            "flop": flop,
            "roofline_us": 1e6 * roofline_seconds(size, flop),
            "goal_us": shape.goal[TOKENS.index(tokens)] if known else None,
            "best_peer_us": shape.peer[TOKENS.index(tokens)] if known else None,
            "calls": len(problem.ids),
            "weight_copies": len(stacks),
            "candidates": {},
        }

    def call(self, function: candidates.Experts, index: int) -> Tensor:
        problem = self.problem
        return function(problem.x, problem.ids[index], problem.weights[index], *self.stacks[index % len(self.stacks)])

    def reference(self) -> None:
        """Exact rows in float64, and the eager loop's in bf16, which sets the budget."""
        self.picked, x, ids, weights = self.problem.rows()
        gate_up, down = self.stacks[0]
        self.exact, self.eager = (
            candidates.loop(x, ids, weights, gate_up, down, dtype) for dtype in (torch.float64, DTYPE)
        )

    def prepare(self, name: str, make: Callable[[], candidates.Experts], *, anyway: bool) -> None:
        """Compile, compare with float64, capture. Whatever goes wrong is this candidate's record."""
        start, entry = time.perf_counter(), dict[str, Any]()
        self.record["candidates"][name] = entry
        try:
            function = make()
            if name == "dsmoe":
                given = (self.problem.x, self.problem.ids[0], self.problem.weights[0], *self.stacks[0])
                reason = candidates.refusal("experts", *given, None, None, "silu", 1.0, 1.0, "concat")
                entry["plain_rule"] = reason if self.problem.device.type == "cuda" else "a trial without a GPU"
            self.call(function, 0)
            if self.problem.device.type == "cuda":
                torch.cuda.synchronize()
            entry["first_call_seconds"] = round(time.perf_counter() - start, 2)
            slots, row = self.problem.ids[0].numel(), 2 * self.problem.x.numel()
            poison(self.problem.device, row, 2 * slots * self.problem.shape.width, row * self.problem.shape.top_k)
            outputs = [self.call(function, index) for index, _ in self.picked]
            actual = torch.cat([y[rows] for y, (_, rows) in zip(outputs, self.picked, strict=True)])
            verdict = within_budget(actual, eager=self.eager, exact=self.exact)
            finite = all(bool(y.isfinite().all()) for y in outputs)
            entry["agreement"] = {
                "ok": verdict.ok and finite,
                "worst": verdict.worst,
                "budget": verdict.budget,
                "rows_over": verdict.rows_over,
                "rows": verdict.rows,
                "all_finite": finite,
            }
            if not (verdict.ok and finite) and not anyway:
                return
            calls = [lambda i=i: self.call(function, i) for i in range(len(self.problem.ids))]
            self.replays[name] = Replay(calls, self.problem.device)
            entry["other_routing_same_bits"] = self.replayed(self.replays[name], outputs[0])
        except Exception as error:  # one candidate's failure must not cost the others their measurement
            entry["error"] = failure(error)
            self.replays.pop(name, None)

    def replayed(self, replay: Replay, eager: Tensor) -> bool | None:
        """Whether the graph's last call, given the first call's routing after the capture, answers as eager did."""
        if replay.graph is None:
            return None
        problem = self.problem
        pairs = ((problem.ids[0], problem.ids[-1]), (problem.weights[0], problem.weights[-1]))
        for first, last in pairs:
            kept = first.clone()
            first.copy_(last)
            last.copy_(kept)
        equal = torch.equal(replay.run(), eager)
        for first, last in pairs:  # back, for the next candidate
            kept = first.clone()
            first.copy_(last)
            last.copy_(kept)
        return equal

    def measure(self, repeats: int) -> None:
        for name, seconds in interleave(self.replays, repeats).items():
            entry = self.record["candidates"][name]
            entry |= summary(seconds)
            entry["share_of_roofline"] = self.record["roofline_us"] / entry["median_us"]
            entry["tflop_per_second"] = self.record["flop"] / entry["median_us"] / 1e6


def graph_calls(tokens: int, device: torch.device) -> int:
    """Calls in a graph: enough that rotation is cold and the graph's own start does not count."""
    if device.type == "cpu":
        return 2
    return 16 if tokens <= 64 else 8 if tokens <= 512 else 4


def run_cell(session: Session, name: str, tokens: int, routing: str, stacks: list[Any], share: float) -> dict[str, Any]:
    """Measure one cell in about `share` seconds: ours whatever it takes, a stock candidate if it still fits."""
    arguments, shape, deadline = session.arguments, SHAPES[name], Deadline(share)
    start = time.perf_counter()
    calls = graph_calls(tokens, session.device)
    problem = Problem(shape, tokens, routing, session.device, calls=calls)
    while len(stacks) < problem.copies:
        stacks.append(tuple(part.clone() for part in stacks[0]))
    cell = Cell(name, problem, routing, stacks[: problem.copies])
    try:
        cell.reference()
        slowest = 0.0
        for candidate, make in functions(shape, tokens, compiled=arguments.compile).items():
            if arguments.candidates and candidate not in arguments.candidates:
                continue
            if candidate != "dsmoe" and deadline.left < slowest:
                cell.record["candidates"][candidate] = {"skipped": "the budget"}
                continue
            before = time.perf_counter()
            cell.prepare(candidate, make, anyway=arguments.disagreeing)
            if not alive(session.device):
                break
            if candidate != "dsmoe":
                slowest = max(slowest, time.perf_counter() - before)
        else:
            cell.measure(arguments.repeats)
    except Exception as error:
        cell.record["error"] = failure(error)
    cell.record["seconds"] = round(time.perf_counter() - start, 1)
    return cell.record


def line(cell: dict[str, Any]) -> str:
    """A cell in one line, for whoever watches."""
    parts = []
    for name, entry in cell["candidates"].items():
        if "median_us" in entry:
            agreed = "" if entry["agreement"]["ok"] else " DISAGREES"
            parts.append(f"{name} {entry['median_us']:.1f} ({entry['share_of_roofline']:.0%}){agreed}")
        else:
            reason = entry.get("error") or entry.get("skipped") or f"disagrees {entry['agreement']}"
            parts.append(f"{name}: {reason}")
    about = f"{cell['shape']:9} T={cell['tokens']:<5} {cell['routing']:7} roof {cell['roofline_us']:.1f}"
    return f"{about} goal {cell['goal_us']} peer {cell['best_peer_us']} | {' | '.join(parts)} | {cell['seconds']} s"


def warm(arguments: Any, processes: int) -> None:
    """Compile every cell's candidates in other processes at once; what they leave in the caches serves this one."""
    cells = [(shape, tokens) for tokens in arguments.tokens for shape in arguments.shapes]
    groups: dict[tuple[str, int], list[str]] = {}
    each = max(1, processes // len(arguments.shapes))
    for shape, tokens in cells:
        groups.setdefault((shape, arguments.tokens.index(tokens) % each), []).append(str(tokens))
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    running = []
    for (shape, _), tokens in groups.items():
        command = [sys.executable, "-m", "benchmarks.gpu_experts", "--compile-only", "--device", arguments.device]
        command += ["--shapes", shape, "--tokens", *tokens, "--out", os.devnull]
        command += ["--candidates", *arguments.candidates] if arguments.candidates else []
        command += [] if arguments.compile else ["--no-compile"]
        running.append(subprocess.Popen(command, env=environment))
    deadline = Deadline(arguments.budget / 2)
    for child in running:
        try:
            child.wait(timeout=max(1.0, deadline.left))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def compile_only(arguments: Any) -> int:
    """Call every candidate of every cell once, on weights that nothing filled."""
    device = torch.device(arguments.device)
    for name in arguments.shapes:
        shape = SHAPES[name]
        gate_up = torch.empty(shape.experts, 2 * shape.width, shape.hidden, dtype=DTYPE, device=device)
        down = torch.empty(shape.experts, shape.hidden, shape.width, dtype=DTYPE, device=device)
        for tokens in arguments.tokens:
            problem = Problem(shape, tokens, "uniform", device, calls=1)
            for candidate, make in functions(shape, tokens, compiled=arguments.compile).items():
                if arguments.candidates and candidate not in arguments.candidates:
                    continue
                if candidate.endswith("batched_mm") and tokens > 1:  # gigabytes in each process
                    continue
                try:
                    make()(problem.x, problem.ids[0], problem.weights[0], gate_up, down)
                except Exception as error:  # the measuring process will meet it again, and record it
                    tell(f"compiling {candidate} for {name}, {tokens} tokens: {failure(error)}")
            release(device)
    return 0


def main() -> int:
    made = parser(__doc__ or "", budget=420)
    made.add_argument("--shapes", nargs="+", default=[name for name in SHAPES if name != "tiny"], choices=SHAPES)
    made.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    made.add_argument("--routing", nargs="+", default=["uniform"], choices=candidates.ROUTINGS)
    made.add_argument("--warm", type=int, default=0, metavar="N", help="compile in N processes first (0: do not)")
    made.add_argument("--compile-only", action="store_true", help="fill the caches and write nothing")
    arguments = parsed(made)
    torch.set_grad_enabled(False)
    if arguments.compile_only:
        return compile_only(arguments)
    session = Session("gpu_experts", arguments, ("shape", "tokens", "routing"))
    session.record["dtype"] = str(DTYPE)[6:]
    if arguments.warm and not arguments.resume:
        warm(arguments, arguments.warm)
        tell(f"warm after {arguments.budget - session.deadline.left:.0f} s")
    plan = [(s, r, t) for s in arguments.shapes for r in arguments.routing for t in arguments.tokens]
    plan = [(s, r, t) for s, r, t in plan if (s, t, r) not in session.done]
    stacks: list[Any] = []
    before = None
    for index, (name, routing, tokens) in enumerate(plan):
        if name != before:
            stacks.clear()
            release(session.device)
            shape, generator = SHAPES[name], torch.Generator(session.device).manual_seed(0)
            sizes = (shape.experts, shape.hidden, shape.width)
            stacks.append(candidates.weight_stacks(*sizes, dtype=DTYPE, generator=generator))
            before = name
        share = session.deadline.left / (len(plan) - index)
        cell = run_cell(session, name, tokens, routing, stacks, share)
        session.keep(cell)
        tell(line(cell))
        if not alive(session.device):
            return session.restart()
        release(session.device)
    told(session)
    return 0


if __name__ == "__main__":
    sys.exit(main())
