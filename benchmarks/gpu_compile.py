"""Seconds from the start of a process to a model's first tokens, with cold caches and then with warm ones.

`python -m benchmarks.gpu_model --measure compile` starts two processes, one after the other, on one new folder of
caches (Inductor's and Triton's): the first is cold, the second warm. Weights are random, made on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_model_candidates import Ours, make_model, make_problem


def measure_compile(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """`{"cold": seconds of each step, "warm": the same}`; a process that fails leaves its last words."""
    found: dict[str, Any] = {"prompt": prompt_length(arguments), "context": arguments.context}
    with tempfile.TemporaryDirectory(prefix="dsmoe-benchmark-") as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        environment = os.environ | {variable: str(Path(folder, sub)) for variable, sub in caches.items()}
        for state in ("cold", "warm"):
            command = [sys.executable, "-m", "benchmarks.gpu_model", "--measure", "first-token", "--shapes", name]
            command += ["--device", arguments.device, "--context", str(arguments.context), "--out", os.devnull]
            command += ["--tokens", str(prompt_length(arguments)), "--started", repr(time.time())]
            command += [] if arguments.compile else ["--no-compile"]
            try:
                done = subprocess.run(
                    command, env=environment, stdout=subprocess.PIPE, text=True, timeout=arguments.budget / 2
                )
                lines = done.stdout.splitlines()
                found[state] = json.loads(lines[-1]) if done.returncode == 0 else {"error": f"exit {done.returncode}"}
            except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
                found[state] = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(name, state, found[state], file=sys.stderr, flush=True)
    return found


def prompt_length(arguments: argparse.Namespace) -> int:
    return arguments.tokens[0] if arguments.tokens else 512


def once(arguments: argparse.Namespace) -> int:
    """The child: make the model, compile prefill, read a prompt, compile decode, add a token; marks as JSON."""
    marks: dict[str, float] = {}

    def mark(what: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks[what] = round(time.time() - arguments.started, 2)

    device = torch.device(arguments.device)
    mark("imported")
    model = make_model(arguments.shapes[0], device)
    mark("weights")
    ours = Ours(model, compiled=arguments.compile)
    for phase, size, what in (("prefill", prompt_length(arguments), "first_token"), ("decode", 1, "second_token")):
        ours.call(make_problem(model, phase, size, arguments.context))()[0].argmax(-1).tolist()
        mark(what)
        marks |= {f"{phase}_{step}": round(seconds, 2) for step, seconds in ours.seconds.items()}
    print(json.dumps(marks))
    return 0
