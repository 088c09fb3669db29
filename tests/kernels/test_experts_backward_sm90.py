"""The backward GEMMs as a Hopper GPU gets them, compiled here without one: tensor cores, copy engine, no spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dsmoe_runtime.kernels.plan_backward import HALF

COMPILE = r'''
import json, re, subprocess, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsmoe_runtime.kernels.device import dgrad, wgrad
from dsmoe_runtime.kernels.plan_backward import HALF

H, I = 2048, 1408
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def build(kernel, tile, blocks, **constants):
    """Pointers and strides are multiples of 16, except offsets' and tiles'; `blocks`: the shapes of descriptors."""
    constants |= {"GROUP": 8, "UP": False, "PDL": True}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = "*i32" if name == "offsets" or name.startswith("tile_") else "i32" if "stride" in name else "*bf16"
        if name in blocks:
            kind = f"tensordesc<bf16{list(blocks[name])}>"
        signature[name] = "constexpr" if name in constants else kind
        if kind in ("*bf16", "i32") and name not in constants:
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([TOOL, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    words = {word: len(re.findall(word, code)) for word in ("HGMMA", "tnspA.tnspB", "LDGSTS", "UTMALDG", "LDL", "STL")}
    loop = compiled.asm["ttgir"].split("scf.for")[-1].split("scf.yield")[0]
    return words | {
        "registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared,
        "pending": re.findall(r"pendings = (\d)", loop), "async": loop.count("async_tma_copy_global_to_local"),
    }


def built_dgrad(tile, depth, width):
    blocks = {"rows": (tile.block_m, tile.block_k), "half_rows": (tile.block_m // 2, tile.block_k)}
    blocks["weight"] = (1, tile.block_k, tile.block_n)
    sizes = {"DEPTH": depth, "WIDTH": width, "stride_n": 1}
    return build(dgrad.through_matrix, tile, blocks, **sizes, HALF=True, ROWS_TMA=True, WEIGHT_TMA="kn")


def built_wgrad(tile, m, n):
    blocks = {"lhs_blocks": (tile.block_k, tile.block_m), "rhs_blocks": (tile.block_k, tile.block_n)}
    return build(wgrad.wgrad, tile, blocks, M=m, N=n, TMA=True)


print(json.dumps({
    "dgrad_down": built_dgrad(HALF.dgrad_down, H, I),
    "dgrad_up": built_dgrad(HALF.dgrad_up, 2 * I, H),
    "wgrad_gate_up": built_wgrad(HALF.wgrad_gate_up, 2 * I, H),
    "wgrad_down": built_wgrad(HALF.wgrad_down, H, I),
}))
'''


@pytest.mark.slow
def test_for_hopper():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    built = json.loads(done.stdout)
    for name, kernel in built.items():
        assert kernel["HGMMA"] > 0, name
        assert kernel["LDL"] + kernel["STL"] + kernel["stack"] == 0, (name, kernel)
        assert kernel["shared"] <= 227 * 1024
        assert kernel["LDGSTS"] == 0 < kernel["UTMALDG"], name  # both operands by the copy engine,
        assert kernel["async"] == 2, name  # ahead of the product that wants them,
        assert kernel["pending"] == ["1"], name  # which runs while the next is issued
        if name.startswith("wgrad"):  # and both straight from where it puts them
            assert kernel["tnspA.tnspB"] >= kernel["HGMMA"] / 2, kernel
    tile = HALF.wgrad_down
    if tile.block_m * tile.block_n == 128 * 128:  # two programs on a multiprocessor
        assert built["wgrad_down"]["shared"] <= 113 * 1024
        assert built["wgrad_down"]["registers"] * 32 * tile.num_warps <= 32 * 1024
