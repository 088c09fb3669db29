"""A whole model on a CPU: format mlir beside eager and stock torch.compile, prefill and decode, in turn.

    python -m benchmarks.mlir_model --preset deepseek-moe-tiny --dtype float32 bfloat16 --tokens 1 16 128 --threads 1

Each candidate is judged against float64 before anything is timed; one that is not within its budget is not timed. Each
round takes a sample of every candidate. Wall time and processor time of all threads are both kept: where others use the
machine, only the latter says what a candidate costs. Results go to benchmarks/results/mlir_model_PRESET.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsmoe_compiler.compare.agree import Judge, run_trace
from dsmoe_compiler.compare.candidates import Candidate, Reference, stock_dynamo
from dsmoe_compiler.compare.conditions import conditions
from dsmoe_compiler.compare.inputs import fixed_inputs
from dsmoe_compiler.compare.measure import Plan
from dsmoe_compiler.compare.ours import through_mlir
from dsmoe_compiler.loading import Loaded, load_model

Sample = tuple[float, float]  # seconds of wall time, and of the processor


def agreeing(loaded: Loaded, plan: Plan, capacity: int, inductor: bool) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """The candidates that compute the same model, and what was found of each."""
    model, judge = loaded.model, Judge(loaded.model)
    candidates: list[Candidate] = [Reference(model, batch=1, capacity=capacity)]
    if inductor:
        candidates.append(Reference(model, batch=1, capacity=capacity, compiled=True))
    ours = through_mlir(model, batch=1, capacity=capacity)
    found, facts = [], []
    for candidate in (*candidates, ours):
        tell(f"checking {candidate.name}")
        first, second = (
            run_trace(candidate, plan.ids_BS, tokens=plan.tokens, context=plan.context, steps=plan.steps)
            for _ in range(2)
        )
        verdict = judge.judge(first, second, None)
        facts.append(
            {
                "candidate": candidate.name, "agrees": verdict.ok, "repeatable": verdict.repeatable,
                "worst_error": verdict.values.worst, "budget": verdict.values.budget,
                "compile_seconds": ours.compile_seconds if candidate is ours else first.seconds - second.seconds,
            }
        )  # fmt: skip
        if verdict.ok:
            found.append(candidate)
    return found, facts


def timed(candidate: Candidate, tokens: int, plan: Plan, *, decode: bool) -> Callable[[], Sample]:
    """A sample: one prefill of so many tokens, or the mean of `plan.steps` tokens after a prompt of `plan.context`."""

    def sample() -> Sample:
        cache = candidate.new_cache()
        if not decode:
            return measured(lambda: candidate.prefill(plan.ids_BS[:, :tokens], cache), 1)
        candidate.prefill(plan.ids_BS[:, : plan.context], cache)

        def steps() -> None:
            for position in range(plan.context, plan.context + plan.steps):
                candidate.decode(plan.ids_BS[:, position : position + 1], position, cache)

        return measured(steps, plan.steps)

    return sample


def measured(run: Callable[[], object], parts: int) -> Sample:
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - wall) / parts, (time.process_time() - processor) / parts


def rounds(runs: dict[str, Callable[[], Sample]], repeats: int) -> dict[str, list[Sample]]:
    """Every candidate once a round; the first round is not kept."""
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            taken = run()
            if number:
                samples[name].append(taken)
    return samples


def cell(candidates: list[Candidate], dtype: str, tokens: int, plan: Plan, *, decode: bool) -> list[dict[str, Any]]:
    """All candidates at one point."""
    samples = rounds({c.name: timed(c, tokens, plan, decode=decode) for c in candidates}, plan.repeats)
    middle = {name: [statistics.median(side) for side in zip(*taken, strict=True)] for name, taken in samples.items()}
    others = [times for name, times in middle.items() if name != "mlir"]
    results = []
    for name, (wall, processor) in middle.items():
        best = [min(times[side] for times in others) for side in (0, 1)]
        results.append(
            {
                "dtype": dtype, "phase": "decode" if decode else "prefill", "tokens": tokens, "candidate": name,
                "tokens_per_second": tokens / wall, "wall": wall, "processor": processor,
                "against_best_other": best[0] / wall, "against_best_other_processor": best[1] / processor,
                "samples": samples[name],
            }
        )  # fmt: skip
        ratio = f"{best[0] / wall:5.2f}x {best[1] / processor:5.2f}x" if name == "mlir" else ""
        phase = "decode" if decode else "prefill"
        print(f"{dtype:9} {phase:8}{tokens:4} {name:9} {tokens / wall:9.1f} tokens/s {1e3 * wall:9.2f} ms  {ratio}")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="deepseek-moe-tiny")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128], help="lengths of prefills (1 16 128)")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded after the longest of them (16)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-inductor", dest="inductor", action="store_false", help="leave stock torch.compile out")
    parser.add_argument("--out", type=Path, help="where to write (benchmarks/results/mlir_model_PRESET.json)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts, results = [], []
    with torch.no_grad(), stock_dynamo():
        for dtype in arguments.dtype:
            loaded = load_model(arguments.preset, dtype=getattr(torch, dtype))
            longest = max(arguments.tokens)
            capacity = longest + arguments.steps
            ids_BS, _ = fixed_inputs(loaded, batch=1, length=capacity)
            plan = Plan(ids_BS, tuple(arguments.tokens), longest, arguments.steps, arguments.repeats)
            candidates, found = agreeing(loaded, plan, capacity, arguments.inductor)
            facts += [{"dtype": dtype, **fact} for fact in found]
            for tokens in arguments.tokens:
                results += cell(candidates, dtype, tokens, plan, decode=False)
            results += cell(candidates, dtype, 1, plan, decode=True)
    out = arguments.out or Path(__file__).parent / "results" / f"mlir_model_{arguments.preset}.json"
    out.parent.mkdir(exist_ok=True)
    about = {"benchmark": "mlir_model", "preset": arguments.preset, "threads": arguments.threads, "agreement": facts}
    record = {**about, "environment": conditions(torch.device("cpu")), "results": results}
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for fact in facts:
        if not fact["agrees"]:
            print(f"{fact['dtype']:9} {fact['candidate']:9} disagrees")
    return 0 if all(fact["agrees"] for fact in facts) else 3


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
