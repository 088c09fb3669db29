"""The tables of the README come from the result files, whatever is written in those."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from tests.compiler.example_comparison import example

DECODE = {
    "benchmark": "decode",
    "preset": "a|b<script>",
    "context": 64,
    "steps": 32,
    "environment": {"cpu": "AMD EPYC", "threads": "2", "command": "python -m benchmarks.decode"},
    "results": [
        {"dtype": "float32", "candidate": "eager", "tokens_per_second": 50.0, "speedup": 1.0}
        | {"mean": 0.02, "sd": 0.001, "median": 0.02, "unstable": True},
        {"dtype": "float32", "candidate": "dsmoe", "agrees": False},
    ],
}


def test_each_kind_of_result_becomes_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(DECODE))
    (tmp_path / "b.json").write_text(json.dumps(example().to_dict()))
    text = report.tables(tmp_path)
    assert "| float32 | eager | 50 | 20 ± 1 | 1.00x | unstable |" in text
    assert "| float32 | dsmoe | disagrees |" in text
    assert "| dsmoe | decode |" in text
    assert "`python -m benchmarks.decode`" in text


def test_the_results_of_this_repository_render() -> None:
    if not list(report.RESULTS.glob("*.json")):
        pytest.skip("no results are committed")
    assert "| tokens |" in report.tables()


def test_an_unknown_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"what": 1}')
    with pytest.raises(ValueError, match=r"odd.json is no result .* its keys are what"):
        report.tables(tmp_path)


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.into(text, "new")
    assert once == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.into(once, "new") == once
    with pytest.raises(ValueError, match="once each"):
        report.into("no marks", "new")


def timed(microseconds: float, **more: Any) -> dict[str, Any]:
    """A candidate's entry as the GPU benchmarks write it."""
    figures = {"median_us": microseconds, "min_us": microseconds, "spread": 0.01, "unstable": False, "samples_us": []}
    return {"agreement": {"ok": True}, **figures, **more}


FACTS = {"gpu": "NVIDIA H200", "command": "python -m benchmarks.x"}
NAME = "transformers grouped_mm"


def expert_cell(tokens: int, routing: str, goal: float | None, **candidates: Any) -> dict[str, Any]:
    cell = {"shape": "16B", "tokens": tokens, "routing": routing, "roofline_us": 24.0, "goal_us": goal}
    return {**cell, "best_peer_us": 36.4 if goal else None, "candidates": candidates}


GPU_EXPERTS = {
    "benchmark": "gpu_experts",
    "dtype": "bfloat16",
    "environment": FACTS,
    "cells": [
        expert_cell(1, "uniform", 29, dsmoe=timed(30.0), grouped_mm=timed(70.0), other=timed(65.0, unstable=True)),
        expert_cell(16, "uniform", 29, dsmoe={"error": "RuntimeError: no"}, grouped_mm=timed(300.0)),
        expert_cell(64, "uniform", 29, dsmoe=timed(28.0) | {"agreement": {"ok": False}}, grouped_mm={"skipped": "b"}),
        expert_cell(1, "same", None, dsmoe=timed(33.0)),
    ],
}
GPU_LAYER = {
    "benchmark": "gpu_layer",
    "environment": FACTS,
    "limit_over_paid": 1.1,
    "hidden": 2048,
    "width": 1408,
    "experts": 64,
    "top_k": 6,
    "shared": 2,
    "cells": [
        {
            "tokens": 64,
            "roofline_us": {"routed": 250.0, "shared": 8.0, "layer": 260.0},
            "over_paid": 1.04,
            "candidates": {
                "dsmoe": timed(280.0, share_of_roofline=0.93),
                "dsmoe routed": timed(262.0),
                "eager": timed(9000.0),
                "grouped_mm": timed(450.0),
            },
        }
    ],
}
BITS = {"forward_runs": 100, "forward_same": True, "step_runs": 10, "step_same": False}
GPU_TRAINING = {
    "benchmark": "gpu_training",
    "environment": FACTS,
    "cells": [
        {
            "tokens": 4096,
            "goal_tflop_per_second": 450.0,
            "best_peer_tflop_per_second": 423.0,
            "candidates": {
                "dsmoe": timed(2800.0, tflop_per_second=455.4, saved_bytes=2**28, repeatable=BITS),
                "grouped_mm": timed(3100.0, tflop_per_second=411.0, saved_bytes=2**29),
            },
        }
    ],
}


def model_cell(preset: str, microseconds: float, **more: Any) -> dict[str, Any]:
    cell = {"preset": preset, "phase": "prefill", "size": 4096, "bound_us": 28000.0}
    ours = timed(microseconds, tokens_per_second=4096e6 / microseconds, share_of_bound=0.5)
    return {**cell, "candidates": {"dsmoe": ours, **more}}


GPU_MODEL = {
    "benchmark": "gpu_model",
    "environment": FACTS,
    "cells": [
        model_cell("deepseek-moe-16b", 56000.0, **{NAME: timed(84000.0, tokens_per_second=48762.0)}),
        model_cell("llama2-7b", 140000.0, eager=timed(280000.0, tokens_per_second=14629.0)),
    ],
    "compile": {
        "deepseek-moe-16b": {
            "prompt": 512,
            "cold": {"first_token": 70.0, "second_token": 99.5},
            "warm": {"error": "exit 1"},
        }
    },
}


def test_routed_experts_stand_beside_stock_and_peers(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(GPU_EXPERTS))
    text = report.tables(tmp_path)
    assert (
        "| 16B | **30.0** / 65.0 (unstable) / 36.4 / 80% | **failed** / 300 / 36.4 / - | **disagrees** / - / 36.4 / - |"
    ) in text
    assert "Ahead of the best peer in 1 of 3 cells, the goal reached in 0" in text
    assert "stock candidate in 1 of 2." in text
    assert "Behind the best peer by more than 5%: 16B T=16, 16B T=64." in text
    assert "| 16B | 1 | same | 33.0 | 1.10x |" in text


def test_layer_training_and_model_become_tables(tmp_path: Path) -> None:
    for name, record in (("l", GPU_LAYER), ("t", GPU_TRAINING), ("m", GPU_MODEL)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    text = report.tables(tmp_path)
    assert "| 64 | 280 | 262 | 8.0 | 1.04x | 450 (grouped_mm) | 9000 | 93% |" in text
    assert "| 4096 | 2800 | 455 | 411 (grouped_mm) | 423.0 | 450.0 | 256 / 512 | NO |" in text
    assert f"| deepseek-moe-16b | prefill 4096 | 73,143 | 50% |  |  | 48,762 ({NAME}) | 1.50x |" in text
    assert "| llama2-7b | prefill 4096 | 29,257 | 50% | 14,629 | 2.0x |  |  |" in text
    assert "prefill 4096: deepseek-moe-16b takes 0.40x the time of llama2-7b." in text
    assert "to the first token (prompt of 512): cold 70.0 s, decode's 99.5 s; warm failed." in text


TRIALS = {
    "gpu_experts": ("--tokens", "1", "16", "--routing", "uniform", "same"),
    "gpu_layer": ("--tokens", "16"),
    "gpu_training": ("--tokens", "32", "--forwards", "3", "--steps", "2"),
    "gpu_model": ("--cells", "decode:2", "--context", "8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIALS)
def test_a_trial_without_a_gpu_writes_what_the_report_reads(name: str, tmp_path: Path) -> None:
    """Every candidate of a trial agrees and is timed; a second run with --resume has nothing left to do."""
    out, shape = tmp_path / "trial.json", "deepseek-moe-tiny" if name == "gpu_model" else "tiny"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--device", "cpu", "--shapes", shape, "--no-compile"]
    command += ["--repeats", "2", "--out", str(out), *TRIALS[name]]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    record = json.loads(out.read_text())
    for cell in record["cells"]:
        assert "error" not in cell
        for candidate, entry in cell["candidates"].items():
            assert entry.get("median_us", 0) > 0, f"{candidate}: {entry}"
    assert "dsmoe" in report.tables(tmp_path)
    subprocess.run([*command, "--resume"], check=True, cwd=Path(__file__).parents[2])
    assert json.loads(out.read_text())["cells"] == record["cells"]
