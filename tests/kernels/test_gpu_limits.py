"""Sizes beyond 32 bits, and memory that nobody may touch, on a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsmoe_runtime.kernels.experts import Weights, run
from dsmoe_runtime.kernels.plan import Plan, Tile
from tests.kernels.cases import ON_GPU, verdict
from tests.runtime.op_cases import attributes, weight

ROOT = Path(__file__).parents[2]
PLAN = Plan("sorted", Tile(128, 64, 64, 4, 3), Tile(128, 128, 64, 4, 3))


@ON_GPU
@pytest.mark.parametrize(("tokens", "hidden"), [(40_000, 7168), (70_000, 64)])
def test_more_than_a_counter_holds(device, tokens, hidden):
    """Answers beyond 2^31 elements, and tokens beyond the 65,535 programs of a grid's second dimension.

    A sample of tokens is judged, the last ones among them.
    """
    top_k, width, num_experts = 8, 64, 8
    assert tokens * top_k * hidden > 2**31 or tokens > 2**16
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16, generator=generator)
    case = {
        "experts": torch.randint(0, num_experts, (tokens, top_k), device=device, generator=generator),
        "weights": torch.rand(tokens, top_k, device=device, generator=generator),
        "gate_up": weight(num_experts, 2 * width, hidden, seed=1, dtype=torch.bfloat16),
        "down": weight(num_experts, hidden, width, seed=2, dtype=torch.bfloat16),
        "gate_up_bias": None,
        "down_bias": None,
    }
    w = Weights.of(case["gate_up"].to(device), case["down"].to(device), None, None, **attributes())
    y = run(x, case["experts"], case["weights"], w, PLAN)
    sample = torch.cat((torch.arange(4), torch.randint(0, tokens, (24,)), torch.arange(tokens - 4, tokens))).to(device)
    rows = {"x": x[sample], "experts": case["experts"][sample], "weights": case["weights"][sample]}
    found = verdict(y[sample].cpu(), case | {name: value.cpu() for name, value in rows.items()})
    assert found.ok, str(found)
    assert not y.isnan().any()


SANITIZED = """
import torch
from tests.kernels.cases import case_of, run, verdict
from tests.kernels.test_gpu_experts import CUTS, REGIMES
from tests.kernels.test_moe import arguments_of, moved
from tests.runtime.op_cases import normal

for plan in (*REGIMES.values(), *CUTS.values()):
    for tokens in (1, 37):
        case = case_of(tokens, "aligned", dtype=torch.bfloat16)
        assert verdict(run("cuda", case, plan), case).ok, plan
for plan in REGIMES.values():
    case = case_of(19, "unaligned", bias=True, dtype=torch.bfloat16)
    assert verdict(run("cuda", case, plan), case).ok, plan
arguments = moved(arguments_of(torch.bfloat16), "cuda")
for tokens in (1, 37):
    torch.ops.dsmoe.moe(normal(tokens, 40, seed=1, dtype=torch.bfloat16).cuda(), *arguments)
torch.cuda.synchronize()
"""


@ON_GPU
def test_compute_sanitizer_finds_no_access_out_of_bounds(device):
    """Each tensor in an allocation of its own, so that the next one's memory cannot hide it."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), *(path for path in sys.path if path))),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    done = subprocess.run(
        [*command, sys.executable, "-c", SANITIZED],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
