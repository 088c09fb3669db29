"""Every kernel as an H200 gets it, built here without one: tensor cores, copy engine, wide loads, no spills."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.kernels import sm90

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "runtime" / "dsmoe_runtime" / "kernels"
SHARED_MEMORY = 227 * 1024
READERS = ("up_pairs", "down_tokens", "combine", "gated", "attend_part", "decode_attention_part", "gemv_rows")
# Bytes of stack. Triton 3.6's assembler, by which tiles are tuned, spills nothing; 3.9's some 40 bytes in two kernels.
MOST_STACK = 0 if version("triton").startswith("3.6.") else 64


def build(part: str) -> list[dict[str, Any]]:
    """What `tests.kernels.sm90` builds, in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), *(path for path in sys.path if path)))
    command = [sys.executable, "-m", "tests.kernels.sm90", part]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def complaints(found: dict[str, Any]) -> list[str]:
    """What is wrong with one kernel's machine code."""
    wrong, rows = [], found["BLOCK_M"]
    most = 64 if "float32" in found["name"] else MOST_STACK
    if found["stack"] > most or found["LDL"] + found["STL"] > most // 2:
        wrong.append(f"{found['stack']} bytes of stack, {found['LDL']} loads and {found['STL']} stores of spills")
    if found["shared"] > SHARED_MEMORY:
        wrong.append(f"{found['shared']} bytes of shared memory")
    product = found["kernel"] in ("up_sorted", "down_sorted", "up_scan", "down_scan")
    if product and "float32" not in found["name"]:
        if found["kernel"].endswith("_sorted") and found["TMA"] and not found["UTMALDG"]:
            wrong.append("weights do not come by the copy engine")
        if rows >= 64 and not found["HGMMA"]:
            wrong.append("no wgmma")
        if rows < 64 and not found["HMMA"]:
            wrong.append("no tensor cores")
        if not found["UTMALDG"] and not found["LDGSTS"]:
            wrong.append("no asynchronous copies")
    if product and "float32" in found["name"] and (found["HMMA"] or found["HGMMA"] or not found["FFMA"]):
        wrong.append("float32 is not multiplied as float32")
    if (
        found["kernel"] in ("up_pairs", "down_tokens", "combine", "gated", "attend_part", "gemv_rows")
        and not found["LDG128"]
    ):
        wrong.append("no loads of 16 bytes")
    return wrong


def launched(*, training: bool) -> set[str]:
    """The names of all kernels that host parts launch, read from the sources: of training alone, or all others."""
    names: dict[bool, set[str]] = {False: set(), True: set()}
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "launch":
                kernel = ast.unparse(node.args[0]).rpartition(".")[2]
                names["backward" in path.stem or "training" in path.stem].add(kernel)
    return names[True] - names[False] if training else names[False]


def test_the_forward():
    """And none is left out: what the sources launch is what was built."""
    built = build("forward")
    assert {found["kernel"] for found in built} == launched(training=False)
    assert {rows for found in built if (rows := found["BLOCK_M"])} >= {16, 64, 128}
    wrong = {f"{found['kernel']} of {found['name']}": reasons for found in built if (reasons := complaints(found))}
    assert not wrong, wrong
    gates = [found for found in built if "gate" in found["kernel"] and found["kernel"] != "gated"]
    assert all(found["HMMA"] + found["HGMMA"] and found["LDGSTS"] for found in gates)


def test_floats_of_64_bits():
    """AOTInductor types every float argument so: a variable that becomes one in a loop does not compile."""
    taking = {"attend_part", "decode_attention_part", "route_kernel", "up_pairs", "up_sorted"}
    assert taking <= {found["kernel"] for found in build("packages")}


@pytest.mark.slow
def test_other_activations_and_nothing_that_gates():
    """No spills either; without a gate half the products and fewer registers."""
    built = build("others")
    assert {found["kernel"] for found in built} == {"up_pairs", "up_scan", "up_sorted"}
    wrong = {f"{found['kernel']} of {found['name']}": reasons for found in built if (reasons := complaints(found))}
    assert not wrong, wrong
    figures = {found["name"]: found for found in built}
    for tokens in (1, 16, 512, 4096):
        with_gate, without = (figures[f"{layout} gelu T={tokens}"] for layout in ("concat", "ungated"))
        assert without["registers"] < with_gate["registers"]
        assert 2 * (without["HGMMA"] + without["HMMA"]) == with_gate["HGMMA"] + with_gate["HMMA"]


@pytest.mark.slow
def test_training():
    built = build("training")
    assert {found["kernel"] for found in built} >= launched(training=True)
    wrong = {f"{found['kernel']} of {found['name']}": reasons for found in built if (reasons := complaints(found))}
    assert not wrong, wrong
    for found in built:  # kernels of whole tiles of the backward: tensor cores, fed by the copy engine
        if found["kernel"] in launched(training=True) and (found["BLOCK_K"] or 0) >= 32:
            assert found["HGMMA"], found
            assert found["UTMALDG"] or found["LDGSTS"], found


@pytest.mark.slow
def test_every_plan_of_every_shape():
    wrong = {
        f"{found['kernel']} of {found['name']}": reasons for found in build("sweep") if (reasons := complaints(found))
    }
    assert not wrong, wrong


def test_grids_are_within_what_cuda_allows():
    """Only the first dimension of a grid may exceed 65,535, and prompts together may have more tokens than that."""
    tokens = 100_000
    for made in (
        sm90.forward("16B", tokens),
        sm90.layer("16B", tokens),
        sm90.router("16B", tokens),
        sm90.training(tokens),
    ):
        for kernel, _, _, grid in made:
            assert all(size <= 65_535 for size in grid[1:]), (kernel.__name__, grid)
            assert grid[0] < 2**31


def test_the_judge_sees_planted_faults():
    good = {
        "kernel": "up_sorted", "name": "", "BLOCK_M": 128, "TMA": True, "stack": 0, "LDL": 0, "STL": 0,
        "shared": 196640, "HGMMA": 16, "HMMA": 0, "FFMA": 0, "UTMALDG": 16, "LDGSTS": 24, "LDG128": 0,
    }  # fmt: skip
    assert not complaints(good)
    for fault in (
        {"stack": 544, "LDL": 60},
        {"shared": 240_000},
        {"HGMMA": 0},
        {"UTMALDG": 0},
        {"BLOCK_M": 16},
        {"kernel": "down_scan", "UTMALDG": 0, "LDGSTS": 0},
        {"name": "2B T=1 float32"},
        {"kernel": "up_pairs"},
    ):
        assert complaints(good | fault), fault
