"""Decode on a CPU, whole model: eager, stock torch.compile and dsmoe, float32 and bfloat16, in one interleaved run.

    python -m benchmarks.decode --preset deepseek-moe-tiny --dtype float32 bfloat16 --threads 2

Every candidate is judged against float64 before anything is timed. A sample is the mean of a block of decode steps
behind a freshly filled prompt; one round takes a sample of every candidate in every dtype. Results go to
benchmarks/results/decode_*.json with all samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dsmoe_compiler.compare.agree import Judge, run_trace
from dsmoe_compiler.compare.candidates import Candidate, Compiled, Reference, stock_dynamo
from dsmoe_compiler.compare.conditions import conditions
from dsmoe_compiler.compare.inputs import fixed_inputs
from dsmoe_compiler.compare.measure import Plan, timed_run
from dsmoe_compiler.compare.ours import compiled
from dsmoe_compiler.compare.timing import interleave
from dsmoe_compiler.loading import load_model


def prepare(
    name: str, dtype: str, arguments: argparse.Namespace, stack: ExitStack
) -> tuple[dict[str, Candidate], Plan, dict[str, dict[str, Any]]]:
    """Build and judge the candidates in one dtype; what does not agree is left out and its verdict kept."""
    loaded = load_model(name, dtype=getattr(torch, dtype))
    model, capacity = loaded.model, arguments.context + arguments.steps
    runner, seconds = stack.enter_context(compiled(loaded, capacity=capacity, tell=tell))
    ids_BS, _ = fixed_inputs(loaded, batch=1, length=capacity)
    plan = Plan(ids_BS, (), arguments.context, arguments.steps, arguments.repeats)
    candidates: list[Candidate] = [Reference(model, batch=1, capacity=capacity), Compiled(runner)]
    if arguments.inductor:
        candidates.insert(1, Reference(model, batch=1, capacity=capacity, compiled=True))
    judge, agreeing, facts = Judge(model), {}, {}
    for candidate in candidates:
        tell(f"checking {candidate.name} in {dtype}")
        first, second = (
            run_trace(candidate, ids_BS, tokens=(), context=plan.context, steps=plan.steps) for _ in range(2)
        )
        verdict = judge.judge(first, second, None)
        lazy = first.seconds - second.seconds if candidate.name == "inductor" else None
        facts[candidate.name] = {
            "agrees": verdict.ok,
            "worst_error": verdict.values.worst,
            "budget": verdict.values.budget,
            "repeatable": verdict.repeatable,
            "compile_seconds": seconds if candidate.name == "dsmoe" else lazy,
        }
        if verdict.ok:
            agreeing[candidate.name] = candidate
    return agreeing, plan, facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="deepseek-moe-tiny")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--context", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=32, help="decode steps in a block")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-inductor", dest="inductor", action="store_false", help="leave stock torch.compile out")
    parser.add_argument("--out", type=Path, help="where to write (benchmarks/results/decode_PRESET.json)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with ExitStack() as stack, torch.no_grad(), stock_dynamo():
        prepared = {dtype: prepare(arguments.preset, dtype, arguments, stack) for dtype in arguments.dtype}
        runs = {
            f"{dtype} {name}": timed_run(candidate, "decode", 1, plan)
            for dtype, (candidates, plan, _) in prepared.items()
            for name, candidate in candidates.items()
        }
        tell(f"timing {len(runs)} candidates, {arguments.repeats} rounds")
        samples = interleave(runs, repeats=arguments.repeats)
    results = []
    for dtype, (_, _, facts) in prepared.items():
        eager = samples[f"{dtype} eager"].median
        for name, fact in facts.items():
            found = samples.get(f"{dtype} {name}")
            timing = (
                {
                    "tokens_per_second": 1 / found.median,
                    "speedup": eager / found.median,
                    **asdict(found),
                }
                if found
                else {}
            )
            results.append({"dtype": dtype, "candidate": name, **fact, **timing})
            if found:
                mark = "  unstable" if found.unstable else ""
                print(f"{dtype:9} {name:9} {1 / found.median:8.1f} tokens/s  {eager / found.median:5.2f}x{mark}")
            else:
                print(f"{dtype:9} {name:9} disagrees")
    out = arguments.out or Path(__file__).parent / "results" / f"decode_{arguments.preset}.json"
    out.parent.mkdir(exist_ok=True)
    about = {"benchmark": "decode", "preset": arguments.preset, "context": arguments.context, "steps": arguments.steps}
    record = {**about, "environment": conditions(torch.device("cpu")), "results": results}
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result["agrees"] for result in results) else 3


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
