"""The whole way on a GPU: compiled, proved, packaged with its kernels, loaded elsewhere, replayed as a CUDA graph."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe_compiler import api
from dsmoe_compiler.artifact import load
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.targets.replay import Replayed
from dsmoe_model.presets import preset
from dsmoe_model.transformer import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
TINY, CAPACITY = "deepseek-moe-tiny", 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the tiny preset in bfloat16; compiling it includes the proof."""
    config = CompileConfig(target="cuda", dtype="bfloat16", max_seq_len=CAPACITY, strict=True)
    artifact = api.compile(TINY, config=config, progress=print)
    return artifact.save(tmp_path_factory.mktemp("gpu") / "out")


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def prompt(length: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(length)).cuda()


def test_it_is_proved_on_the_gpu(manifest: Any) -> None:
    assert manifest["verification"]["ok"]
    assert manifest["verification"]["device"].startswith("cuda")
    assert all(layer["kernel"].startswith("Triton kernels (sm_") for layer in manifest["layers"])


def test_the_packages_hold_the_kernels_and_call_no_operator_of_ours(folder: Path, manifest: Any) -> None:
    for phase in ("prefill", "decode"):
        report = manifest["phases"][phase]
        assert not [name for name in report["operators"] if "dsmoe" in name]
        with zipfile.ZipFile(folder / report["file"]) as archive:
            names = archive.namelist()
            wrapper = "".join(archive.read(n).decode() for n in names if n.endswith(".wrapper.cpp"))
        assert [n for n in names if n.endswith(".cubin")]
        assert "dsmoe::" not in wrapper
        assert "down_sorted" in wrapper or "down_tokens" in wrapper or "down_scan" in wrapper


def test_another_process_generates_what_eager_does(folder: Path) -> None:
    """Greedy tokens of the reference model, from the folder alone; ties in bfloat16 may part them, late and seldom."""
    code = """
import sys, torch
from dsmoe_compiler.artifact import load
runner = load(sys.argv[1])
ids = torch.tensor([eval(sys.argv[2])], device="cuda")
print(runner.generate(ids, max_new_tokens=24)[0].tolist())
"""
    ids = prompt(9)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(ids[0].tolist())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours = json.loads(done.stdout.splitlines()[-1])
    model = build(preset(TINY), dtype=torch.bfloat16, device="cuda", seed=0)
    with torch.no_grad():
        for _ in range(24):
            ids = torch.cat((ids, model(ids).logits_BSV[:, -1:].argmax(-1)), 1)
    same = next((i for i, (a, b) in enumerate(zip(ours, ids[0].tolist(), strict=True)) if a != b), len(ours))
    assert same >= 9 + 8, f"they part after {same - 9} of 24 new tokens"


def test_a_graph_gives_the_bits_of_single_launches(folder: Path) -> None:
    """The first decode of a cache launches kernels, the second captures, others replay; routing changes with ids."""
    graphed, plain = load(folder), load(folder, cuda_graph=False)
    caches = graphed.new_cache(), plain.new_cache()
    for runner, cache in zip((graphed, plain), caches, strict=True):
        runner.prefill(prompt(5), cache)
    for step in range(12):
        ids = prompt(step + 1)[:, -1:]
        (logits, experts), (logits_2, experts_2) = (
            runner.decode(ids, 5 + step, cache) for runner, cache in zip((graphed, plain), caches, strict=True)
        )
        assert torch.equal(logits, logits_2), step
        assert torch.equal(experts, experts_2), step
    for ours, theirs in zip(caches[0].key, caches[1].key, strict=True):
        assert torch.equal(ours, theirs)
    program = graphed._programs["decode"]
    assert isinstance(program, Replayed)
    assert program.able, "the decode step could not be captured"
    assert [graph is not None for graph in program.graphs.values()] == [True]


def test_two_caches_do_not_mix(folder: Path) -> None:
    runner = load(folder)
    first, second = runner.new_cache(), runner.new_cache()
    runner.prefill(prompt(4), first)
    runner.prefill(prompt(7), second)
    alone = []
    for step in range(4):
        alone.append(runner.decode(prompt(3)[:, -1:], 4 + step, first)[0])
    runner.prefill(prompt(4), first)
    for step in range(4):
        runner.decode(prompt(2)[:, -1:], 7 + step, second)
        assert torch.equal(runner.decode(prompt(3)[:, -1:], 4 + step, first)[0], alone[step]), step


@pytest.mark.parametrize("length", [1, 2, 31, CAPACITY])
def test_prompts_of_every_length(folder: Path, length: int) -> None:
    """The kernels are cut for half of what fits; a prompt may have any length. Eager in float32 is the measure."""
    runner = load(folder)
    logits, experts = runner.prefill(prompt(length), runner.new_cache())
    model = build(preset(TINY), dtype=torch.bfloat16, device="cuda", seed=0)
    with torch.no_grad():
        eager = model(prompt(length)).logits_BSV[:, -1].float()
        exact = model.float()(prompt(length)).logits_BSV[:, -1]
    assert experts.shape[1] == length
    error, budget = (logits.float() - exact).norm(), (eager - exact).norm()
    assert error <= 2 * budget + 0.02 * exact.norm(), (error, budget)
