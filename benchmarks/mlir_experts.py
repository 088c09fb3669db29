"""The routed experts of one layer on a CPU: our MLIR kernels, torch eager and grouped, Inductor, ONNX Runtime, in turn.

    python -m benchmarks.mlir_experts --tokens 1 8 64 512 --dtype float32 bfloat16 --threads 1 2

Agreement with float64 is checked before anything is timed; a candidate that is not within the budget is not. Each round
times every candidate once: a pause for the threads of the last one to fall asleep, a call that wakes its own, the call
that counts. Wall time and processor time (of all threads) are both kept: where others use the machine,
only the latter says what a candidate costs. Peaks of products and of reading are measured before and after each cell,
by code of our own. Results go to benchmarks/results/mlir_experts.json, after every cell.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dsmoe_runtime.ops  # noqa: F401  (registers torch.ops.dsmoe)
from benchmarks.cpu_layer import cpu_name
from benchmarks.cpu_peak import gflop_s, read_gb_s
from benchmarks.mlir_peers import ort_call
from dsmoe_compiler.environment import package_version
from dsmoe_runtime.agreement import within_budget
from dsmoe_runtime.mlir.experts import experts
from dsmoe_runtime.mlir.levels import best_level, lacking, level_named

PAUSE = 0.1  # seconds; ONNX Runtime's idle threads spin for some 30 ms, and would take a core from the next candidate
DOT = "avx512_bf16"  # the level whose products are in pairs
HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 1408, 64, 6  # deepseek-moe-16b
Weights = tuple[Tensor, Tensor]
Call = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x, ids, weights, logits


def one_expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def loop_call(weights: Weights, expert: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    """A loop over the experts that were hit, as models spell it."""

    def call(x: Tensor, ids: Tensor, factors: Tensor, _: Tensor) -> Tensor:
        y = torch.zeros(x.shape)
        for e in ids.unique().tolist():
            tokens, slots = torch.where(ids == e)
            answer = expert(x[tokens], weights[0][e], weights[1][e])
            y.index_add_(0, tokens, answer.float() * factors[tokens, slots, None])
        return y.to(x.dtype)

    return call


def grouped(x: Tensor, ids: Tensor, factors: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As transformers' `grouped_mm` experts: sort, two grouped products, weigh, sum over k."""
    order = ids.flatten().argsort(stable=True)
    offsets = torch.bincount(ids.flatten(), minlength=EXPERTS).cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(x[order // TOP_K], gate_up.mT, offs=offsets).chunk(2, dim=-1)
    answers = torch._grouped_mm(F.silu(gate) * up, down.mT, offs=offsets)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return (answers[back].view(-1, TOP_K, HIDDEN) * factors[..., None]).sum(1).to(x.dtype)


def candidates(weights: Weights) -> dict[str, Call]:
    """All of them, by name; those that compile do it when first called."""
    dynamic = torch.compile(one_expert, dynamic=True)
    compiled = torch.compile(grouped, dynamic=True)
    calls: dict[str, Call] = {
        "mlir": lambda x, ids, w, _: experts(x, ids, w, *weights, None, None, "silu", 1.0, 1.0, "concat"),
        "eager loop": loop_call(weights, one_expert),
        "grouped_mm": lambda x, ids, w, _: grouped(x, ids, w, *weights),
        "dsmoe rule": lambda x, ids, w, _: torch.ops.dsmoe.experts(
            x, ids, w, *weights, None, None, "silu", 1.0, 1.0, "concat"
        ),
        "inductor loop": loop_call(weights, dynamic),
        "inductor grouped_mm": lambda x, ids, w, _: compiled(x, ids, w, *weights),
    }
    dot = level_named(DOT)
    if weights[0].dtype == torch.bfloat16 and not lacking(dot):  # never taken unasked: it rounds the hidden state
        calls[f"mlir {DOT}"] = lambda x, ids, w, _: experts(
            x, ids, w, *weights, None, None, "silu", 1.0, 1.0, "concat", level=dot
        )
    return calls


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of wall time, and of processor time of all threads."""
    time.sleep(PAUSE)
    call()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def exact(x: Tensor, ids: Tensor, factors: Tensor, weights: Weights) -> Tensor:
    """Float64, one expert at a time."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for e in ids.unique().tolist():
        tokens, slots = torch.where(ids == e)
        answer = one_expert(x[tokens].double(), weights[0][e].double(), weights[1][e].double())
        y.index_add_(0, tokens, answer * factors[tokens, slots, None].double())
    return y


def measure(calls: dict[str, Call], weights: Weights, tokens: int, threads: int, seconds: float) -> dict[str, Any]:
    """One cell."""
    dtype = weights[0].dtype
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    factors, ids = logits.softmax(-1).topk(TOP_K)
    inputs, truth = (x, ids, factors, logits), exact(x, ids, factors, weights)
    eager, agreed, notes = calls["eager loop"](*inputs), {}, {}
    for name, call in list(calls.items()):
        try:
            verdict = within_budget(call(*inputs), eager=eager, exact=truth)
            agreed[name] = {"ok": verdict.ok, "worst": verdict.worst, "budget": verdict.budget}
        except Exception as error:  # whatever it throws is the result: it does not run here
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    ready = {name: calls[name] for name, verdict in agreed.items() if verdict["ok"]}
    peaks = [(gflop_s(threads, 3, 10), read_gb_s(threads, 2))]
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    start = time.perf_counter()
    while len(samples["mlir"]) < 3 or (time.perf_counter() - start < seconds and len(samples["mlir"]) < 30):
        for name, call in ready.items():
            samples[name].append(timed(lambda call=call: call(*inputs)))
    peaks.append((gflop_s(threads, 3, 10), read_gb_s(threads, 2)))
    rows = {name: summary(values) for name, values in samples.items()}
    hit = ids.unique().numel()
    size, flop = hit * 3 * HIDDEN * WIDTH * dtype.itemsize, 6 * HIDDEN * WIDTH * TOP_K * tokens
    peak_flop, peak_read = (max(p[n] for p in peaks) for n in (0, 1))
    ours = rows["mlir"]
    cell: dict[str, Any] = {"dtype": str(dtype)[6:], "tokens": tokens, "threads": threads, "experts_hit": hit}
    for key in ("wall_median", "wall_min", "cpu_min"):
        others = {name: row[key] for name, row in rows.items() if not name.startswith("mlir")}
        best = min(others, key=lambda name: others[name])
        cell[f"ahead_by_{key}"] = others[best] / ours[key]
        cell[f"best_other_by_{key}"] = best
    cell |= {
        "peak_gflop_s": peak_flop, "peak_read_gb_s": peak_read,
        "share_of_read": size / ours["wall_min"] / 1e6 / peak_read,
        "share_of_peak": flop / ours["wall_min"] / 1e6 / peak_flop,
        "load": os.getloadavg()[0], "agreement": agreed, "notes": notes, "milliseconds": rows, "samples": samples,
    }  # fmt: skip
    return cell


def summary(values: list[tuple[float, float]]) -> dict[str, float]:
    """Of (wall, processor) milliseconds."""
    wall, cpu = ([value[n] for value in values] for n in (0, 1))
    spread = statistics.stdev(wall) if len(wall) > 1 else 0.0
    return {
        "wall_median": statistics.median(wall), "wall_min": min(wall), "wall_sd": spread,
        "cpu_median": statistics.median(cpu), "cpu_min": min(cpu), "rounds": len(values),
    }  # fmt: skip


def show(cell: dict[str, Any]) -> None:
    """A line for the reader."""
    times = "  ".join(
        f"{name} {row['wall_min']:.1f}/{row['cpu_min']:.1f}" for name, row in cell["milliseconds"].items()
    )
    print(
        f"{cell['dtype']:8} T={cell['tokens']:<4} {cell['threads']} threads: "
        f"ahead {cell['ahead_by_wall_min']:.2f}x (wall min) {cell['ahead_by_cpu_min']:.2f}x (cpu min), "
        f"{cell['share_of_read']:.0%} of {cell['peak_read_gb_s']:.1f} GB/s, "
        f"{cell['share_of_peak']:.0%} of {cell['peak_gflop_s']:.0f} GFLOP/s, load {cell['load']:.1f} | {times}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10, help="of each cell; three rounds in any case")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mlir_experts.json")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    cells: list[dict[str, Any]] = []
    result = {
        "benchmark": "mlir_experts",
        "command": shlex.join(["python", "-m", "benchmarks.mlir_experts", *sys.argv[1:]]),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "level": best_level().name},
        "versions": {name: package_version(name) for name in ("torch", "torch-mlir", "onnxruntime")}
        | {"python": platform.python_version()},
        "layer": {"hidden": HIDDEN, "width": WIDTH, "experts": EXPERTS, "top_k": TOP_K},
        "cells": cells,
    }
    for name in options.dtype:
        dtype = getattr(torch, name)
        generator = torch.Generator().manual_seed(0)
        weights = (
            (torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator) * HIDDEN**-0.5).to(dtype),
            (torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator) * WIDTH**-0.5).to(dtype),
        )
        for threads in options.threads:
            torch.set_num_threads(threads)
            torch._dynamo.reset()
            calls = candidates(weights)
            if dtype == torch.float32:
                ort = ort_call(*weights, TOP_K, threads)
                if ort is not None:
                    calls["onnxruntime MoE"] = ort
            for tokens in options.tokens:
                cells.append(measure(calls, weights, tokens, threads, options.seconds))
                show(cells[-1])
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in options.dtype:
        ahead = [cell["ahead_by_wall_min"] for cell in cells if cell["dtype"] == name]
        cpu = [cell["ahead_by_cpu_min"] for cell in cells if cell["dtype"] == name]
        means = [statistics.geometric_mean(values) for values in (ahead, cpu)]
        print(f"{name}: geometric mean {means[0]:.2f}x wall, {means[1]:.2f}x cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
