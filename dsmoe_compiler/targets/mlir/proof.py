"""What the mlir format has to prove beside its best level: the other levels, and libmodel.so at each of them.

The library runs the objects that the runner runs, with the same weights: it must give the same bits, in a process
without torch. A level that this processor lacks was compiled and cannot be proved here; its check says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_compiler.artifact import Artifact, inside, interface
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.runner import Runner
from dsmoe_compiler.targets.mlir.linking import LIBRARY
from dsmoe_compiler.targets.mlir.opening import open_mlir, runnable
from dsmoe_compiler.verify import Check, Verification, probes, verify
from dsmoe_compiler.verify.trace import run
from dsmoe_model.transformer import Transformer
from dsmoe_runtime.mlir.levels import LEVELS, lacking

CLIENT = Path(__file__).with_name("client.py")


def extend(result: Verification, model: Transformer, artifact: Artifact, config: CompileConfig) -> Verification:
    """`result`, which is about the best level, with checks of the others and of the library."""
    folder, manifest = artifact.folder, artifact.manifest
    seen = interface(folder, manifest, artifact.config)
    runners = {
        level: open_mlir(folder, manifest, seen, artifact.tokenizer, None, inside, level)
        for level in runnable(folder, manifest)  # the best one last
    }
    checks: list[Check] = []
    for level, runner in list(runners.items())[:-1]:
        found = verify(model, runner, [], config=config)
        checks += [replace(check, name=f"{level}: {check.name}") for check in found.checks]
    if manifest["mlir"]["library"]["missing"] is None:
        checks += [check_library(folder, level, runner, seed=config.seed) for level, runner in runners.items()]
    checks += [unproved(level) for level in manifest["mlir"]["levels"] if level not in runners]
    return replace(result, checks=(*result.checks, *checks))


def unproved(name: str) -> Check:
    """Says that a level was not run."""
    missing = ", ".join(lacking(LEVELS[name]))
    return Check(name, ok=True, detail=f"compiled, not run: this processor lacks {missing}", numbers={"run": False})


def check_library(folder: Path, level: str, runner: Runner, *, seed: int) -> Check:
    """The same logits, to the bit, from libmodel.so in another process."""
    name = f"{LIBRARY}, {level}"
    plan = probes(runner.vocab_size, batch=runner.batch_size, capacity=runner.capacity, seed=seed)
    traces = [run(runner, prompt_BS, runner.new_cache(), steps=steps) for prompt_BS, steps in plan]
    runs = [(t.ids_BS[:, : t.prompt].tolist(), t.ids_BS[:, t.prompt :].T.tolist()) for t in traces]
    try:
        ours = called(folder, level, runs)
    except RuntimeError as error:
        return Check(name, ok=False, detail=str(error))
    theirs = torch.cat([trace.logits_BNV.float().transpose(0, 1).flatten() for trace in traces])
    if ours.shape != theirs.shape:
        return Check(name, ok=False, detail=f"{ours.numel()} logits, the runner has {theirs.numel()}")
    other = int((ours.view(torch.int32) != theirs.view(torch.int32)).sum())
    differ = f"{other} of {ours.numel()} logits differ from the runner's"
    detail = differ if other else "the runner's bits, in a process without torch"
    return Check(name, ok=not other, detail=detail, numbers={"logits": ours.numel(), "differ": other})


def called(folder: Path, level: str, runs: Sequence[tuple[Any, Any]]) -> Tensor:
    """The logits of all runs. Raises: RuntimeError, with what the library or the system says."""
    job = {"folder": str(folder), "level": level, "runs": [{"prompt": p, "tokens": t} for p, t in runs]}
    done = subprocess.run(
        [sys.executable, "-I", str(CLIENT)], input=json.dumps(job).encode(), capture_output=True, check=False
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(said[-1][:300] if said else f"the process ended with {done.returncode}")
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
