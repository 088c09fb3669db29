"""Products of bfloat16 in pairs (vdpbf16ps): their layout on any processor, and the instruction in the machine code.

Where it lacks the instruction, the operation is replaced in the text by what it means, on vectors of half the length;
all else, how tokens and hidden state are stored and how a row's end is padded, is what the level has.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("torch_mlir")

from dsmoe_runtime.agreement import assert_within_budget
from dsmoe_runtime.mlir.experts_lowering import ExpertsSpec, experts_function
from dsmoe_runtime.mlir.function import Function
from dsmoe_runtime.mlir.gate_up import Activation
from dsmoe_runtime.mlir.kernel import function_object, kernel
from dsmoe_runtime.mlir.levels import LEVELS, Level, best_level, cpu_flags, level_named
from dsmoe_runtime.mlir.linear_lowering import LinearSpec, linear_function
from tests.runtime.op_cases import ALPHA, LIMIT, exact, expert_case, normal, run, slot_by_slot, weight

needs_avx2 = pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2")
EMULATED = {n: Level(f"emulated {n}", n, 3 * n // 4, "x86-64-v3", "", True, LEVELS["avx2"].flags) for n in (8, 16)}
DOT = re.compile(r"(%\w+) = x86\.avx512\.dot (\S+), (\S+), (\S+) : vector<\d+xbf16> -> vector<\d+xf32>")


def emulated(function, lanes):
    """The same function with each product in pairs written out: even values, then odd ones."""

    def written_out(found):
        result, total, *factors = found.groups()
        words, floats = f"vector<{lanes}xi32>", f"vector<{lanes}xf32>"
        lines = [
            f"{result}_s = arith.constant dense<16> : {words}",
            f"{result}_m = arith.constant dense<-65536> : {words}",
        ]
        for name, factor in zip("ab", factors, strict=True):
            lines += [
                f"{result}_{name} = vector.bitcast {factor} : vector<{2 * lanes}xbf16> to {words}",
                f"{result}_{name}e = arith.shli {result}_{name}, {result}_s : {words}",
                f"{result}_{name}o = arith.andi {result}_{name}, {result}_m : {words}",
                *(f"{result}_{name}{p}f = vector.bitcast {result}_{name}{p} : {words} to {floats}" for p in "eo"),
            ]
        return "\n".join(
            [
                *lines,
                f"{result}_t = vector.fma {result}_aef, {result}_bef, {total} : {floats}",
                f"{result} = vector.fma {result}_aof, {result}_bof, {result}_t : {floats}",
            ]
        )

    source, count = DOT.subn(written_out, function.source)
    assert count > 20
    assert "x86." not in source
    return kernel(Function(function.name, source, function.arguments), EMULATED[lanes])


@needs_avx2
@pytest.mark.parametrize("lanes", EMULATED)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 63, 300])
@pytest.mark.parametrize(("rows", "size"), [(100, 256), (45, 77), (13, 16), (5, 3)])
def test_linear(tokens, rows, size, lanes):
    x, w = normal(tokens, size, seed=1, dtype=torch.bfloat16), weight(rows, size, seed=2, dtype=torch.bfloat16)
    y = torch.full((tokens, rows), torch.nan, dtype=torch.bfloat16)
    emulated(linear_function(LinearSpec("bf16", "bf16", None, EMULATED[lanes])), lanes)([x, w, y])
    assert_within_budget(y, eager=F.linear(x, w), exact=F.linear(x.double(), w.double()))


@needs_avx2
@pytest.mark.parametrize("lanes", EMULATED)
@pytest.mark.parametrize("tokens", [1, 7, 63, 300])
@pytest.mark.parametrize(("hidden", "width"), [(42, 27), (128, 96), (300, 853)])
def test_experts(tokens, hidden, width, lanes):
    case = expert_case(tokens, hidden=hidden, width=width, dtype=torch.bfloat16)
    y = torch.full((tokens, hidden), torch.nan, dtype=torch.bfloat16)
    spec = ExpertsSpec("bf16", Activation("silu", ALPHA, LIMIT), "concat", False, False, EMULATED[lanes])
    names = ("x", "experts", "weights", "gate_up", "down")
    emulated(experts_function(spec), lanes)([*(case[name] for name in names), y])
    assert_within_budget(y, eager=run(case), exact=slot_by_slot(**exact(case), activation="silu"))


def test_the_machine_code_has_the_instruction(tmp_path):
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    level = level_named("avx512_bf16")
    function = linear_function(LinearSpec("bf16", "bf16", None, level))
    (tmp_path / "kernel.o").write_bytes(function_object(function, level))
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(tmp_path / "kernel.o")], capture_output=True, text=True, check=True
    ).stdout
    assert len(re.findall(r"\bvdpbf16ps .*%zmm", text)) > 20


def test_it_is_never_chosen_unasked():
    """It rounds what others keep in float32."""
    assert best_level(LEVELS["avx512_bf16"].flags).name == "avx512"
