"""`dsmoe tune`: what it refuses and prints without a GPU, and which plans its search keeps, on a bench that is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest
import torch

from dsmoe_compiler import search, tuning
from dsmoe_compiler.cli import main
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.kernels import choose, tuned
from dsmoe_runtime.kernels.plan import Plan, Shape

TINY = "deepseek-moe-tiny"
H200 = choose.named("H200")
SHAPE = Shape(4096, 2048, 1408, 64, 6, "bfloat16")
here = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture(autouse=True)
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "PACKAGED", tmp_path / "none")
    choose.forget()


class Told:
    """A bench whose plans take what a function says, with a little noise."""

    def __init__(self, seconds: Callable[[Plan], float], *, jitter: float = 0.0, wrong: Sequence[str] = ()) -> None:
        self.told, self.jitter, self.wrong = seconds, jitter, wrong
        self.clock, self.random = 0.0, Random(1)
        self.broken: set[Plan] = set()
        self.timed: set[Plan] = set()

    def warm(self, plans: Sequence[Plan]) -> dict[Plan, str]:
        self.clock += 1
        return {plan: "does not compile" for plan in plans if plan in self.broken}

    def seconds(self, plan: Plan) -> float:
        assert plan not in self.broken
        self.timed.add(plan)
        self.clock += 0.01
        return self.told(plan) * (1 + self.jitter * self.random.uniform(-1, 1))

    def forget(self, plan: Plan) -> None: ...

    def disagreement(self, plan: Plan, incumbent: Plan) -> str | None:
        return "off by far" if str(plan.up.num_warps) in self.wrong and plan != incumbent else None


def cell(bench: Told, seconds: float = 1e9) -> search.Result:
    return search.tune_cell(bench, SHAPE, H200, seconds, clock=lambda: bench.clock)


def slow_but(check: Callable[[Plan], bool], gain: float = 0.2) -> Callable[[Plan], float]:
    return lambda plan: 1e-3 * (1 - gain if check(plan) else 1)


def test_a_winner_is_found_among_tiles_and_what_the_model_has_no_opinion_on() -> None:
    found = cell(
        Told(lambda p: 1e-3 - 2e-4 * (p.down.num_warps == 4) - 1e-4 * (p.up.num_stages == 3) - 1e-4 * (p.group == 4))
    )
    assert found.kept
    assert (found.tuned.down.num_warps, found.tuned.up.num_stages, found.tuned.group) == (4, 3, 4)
    assert found.incumbent == choose.choose(SHAPE, H200)
    assert found.gain == pytest.approx(0.4)


def test_a_lead_below_two_percent_or_within_the_noise_is_not_kept() -> None:
    small = cell(Told(slow_but(lambda p: p.group == 4, 0.015)))
    assert not small.kept
    assert "less than 2 %" in small.why
    noisy = cell(Told(slow_but(lambda p: p.group == 4, 0.05), jitter=0.05))
    assert not noisy.kept
    same = cell(Told(lambda p: 1e-3))
    assert not same.kept
    assert same.why == "none was faster" or "less than" in same.why


def test_the_noise_is_that_of_the_difference_within_a_round() -> None:
    drift = [1.0 + 0.02 * i for i in range(15)]  # a clock that slows down slows both
    kept, why = search.verdict(drift, [0.95 * s for s in drift])
    assert kept, why
    assert not search.verdict(drift, [0.95 * s for s in reversed(drift)])[0]


def test_a_plan_with_other_results_is_left_out_however_fast() -> None:
    found = cell(Told(slow_but(lambda p: p.up.num_warps == 4), wrong=["4"]))
    assert not found.kept
    assert found.tuned.up.num_warps != 4
    assert "gave other results" in found.why


def test_plans_that_do_not_compile_are_set_aside_but_not_the_one_in_use() -> None:
    bench = Told(slow_but(lambda p: p.group == 4))
    bench.broken = {p for p in choose.candidates(SHAPE, H200) if p.regime == "sorted" and p.up.block_m == 64}
    assert cell(bench).kept
    bench.broken = {choose.choose(SHAPE, H200)}
    with pytest.raises(TargetError, match="does not compile"):
        cell(bench)


def test_the_time_box_holds_but_for_the_final() -> None:
    bench = Told(slow_but(lambda p: p.group == 4))
    found = cell(bench, seconds=1.0)
    assert bench.clock < 3
    assert found.tried <= 4
    whole = Told(slow_but(lambda p: p.group == 4))
    cell(whole)
    assert len(whole.timed) > 2 * len(bench.timed)


def test_dry_run_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", TINY, "--dry-run", "--gpu", "H200", "--tokens", "1,4096"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("NVIDIA H200, bfloat16")
    assert [line.split()[1] for line in out.splitlines()[2:]] == ["1"] * 5 + ["4096"] * 5
    arguments = ["--dry-run", "--gpu", "A100", "--dtype", "fp32", "--json"]
    assert main(["tune", "--shape", "64,64,8,2", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["tune", "--shape", "64,64,8,2,0", *arguments]) == 0  # as tables print a layer without shared experts
    assert json.loads(capsys.readouterr().out) == found
    assert found["device"]["name"] == "NVIDIA A100"
    assert {plan["tokens"] for plan in found["plans"]} == set(tuning.TOKENS)
    assert all(plan["predicted_us"] > 0 for plan in found["plans"])


@here
def test_without_a_gpu_the_way_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", TINY]) == 2
    assert "--dry-run --gpu H200" in capsys.readouterr().err
    assert main(["tune", TINY, "--dry-run"]) == 2
    assert "--gpu H200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["llama2-7b", "--dry-run", "--gpu", "H200"], "no mixture-of-experts layer"),
        ([TINY, "--dry-run", "--gpu", "Voodoo"], "L40S"),
        ([TINY, "--gpu", "H200"], "--dry-run"),
        (["--shape", "64,32,8"], "H,I,E,K"),
        (["--shape", "64,32,4,8"], "only 4 experts"),
        (["--shape", "64,32,4,0"], "0 is below 1"),
        (["--shape", "64,32,4,2,-1"], "-1 is below 0"),
        ([], "required"),
        ([TINY, "--all-shapes"], "not allowed"),
    ],
    ids=str,
)
def test_what_cannot_be_tuned_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["tune", *arguments])
    except SystemExit as leave:
        code = leave.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["512,256,16,4", "512,256,16,4,2"])
def test_tuning_a_small_layer_writes_what_it_keeps(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.json"
    arguments = ["--shape", shape, "--tokens", "1,64,1024", "--budget", "30", "--write", str(table), "--json"]
    assert main(["tune", *arguments]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["shape"]["tokens"] for result in results] == [1, 64, 1024]
    assert all(result["tried"] > 3 for result in results)
    kept = sum(result["kept"] for result in results)
    assert len(tuned.read(table)[1] if kept else []) == kept
