"""Under what conditions a number was measured: machine, versions, threads, commit, command, clocks."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from dsmoe_compiler.environment import cpu_name, package_version


def conditions(device: torch.device) -> dict[str, str]:
    """Ordered facts, ready to print; what is not installed or not known is left out."""
    facts: dict[str, str | None] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": _command(sys.orig_argv),
        "dsmoe-compiler": package_version("dsmoe-compiler"),
        "commit": _commit(),
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
        facts |= _gpu_state(device)
    else:
        facts["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    return {name: fact for name, fact in facts.items() if fact}


def _command(argv: list[str]) -> str:
    """As it was typed, without the folders of the interpreter and of the script."""
    script = "-m" not in argv[:4] and len(argv) > 1 and not argv[1].startswith("-")
    return shlex.join([Path(argv[1]).name, *argv[2:]] if script else ["python", *argv[1:]])


def _commit() -> str:
    here = str(Path(__file__).parent)
    commit = _output(["git", "-C", here, "rev-parse", "--short=12", "HEAD"])
    return f"{commit} + changes" if commit and _output(["git", "-C", here, "status", "--porcelain", "-uno"]) else commit


def _gpu_state(device: torch.device) -> dict[str, str]:
    fields = {"driver": "driver_version", "sm clock": "clocks.sm", "memory clock": "clocks.mem", "power": "power.draw"}
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    query = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    values = [value.strip() for value in _output(query).split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
