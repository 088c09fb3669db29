"""What decides the result of a compile, as one hash: our sources, tools, the machine, what was asked for, the model.

A change of any makes another key, and nothing is found. Left out: values of weights, `seed`, which only draws them, and
`verify`, as the proof runs on what comes out of the cache too.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dsmoe_compiler.compiled.fingerprint import OURS, Unusual, fingerprint
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.targets import aoti
from dsmoe_compiler.targets.mlir.linking import compiler
from dsmoe_model.transformer import Transformer
from dsmoe_runtime.cache import cache_folder
from dsmoe_runtime.mlir.levels import best_level

ENTRY_VERSION = "1"  # of what an entry holds
SWITCHES = ("DSMOE_", "TORCH", "TRITON_", "AOT_INDUCTOR", "CXX", "CUDA")  # environment variables that tools read
NOT_SWITCHES = ("DSMOE_CACHE_DIR", "DSMOE_LOG_LEVEL", "DSMOE_DEBUG", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def key_of(model: Transformer, config: CompileConfig, capacity: int) -> str:
    """Raises: Unusual, if the model or the machine cannot be told from others."""
    parts = {
        "entry": ENTRY_VERSION,
        "sources": sources(),
        "versions": {name: version(name) for name in ("torch", "triton", "torch-mlir")} | {"torch": torch.__version__},
        "machine": machine(config),
        "config": {k: v for k, v in config.to_dict().items() if k not in ("seed", "verify")},
        "capacity": capacity,
        "model": fingerprint(model),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def sources() -> str:
    """A hash of every file of our packages: read once a process."""
    digest = hashlib.sha256()
    for package in OURS:
        file = importlib.import_module(package).__file__
        if file is None:
            raise Unusual(f"the package {package} is not made of files")
        for path in sorted(Path(file).parent.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                content = path.read_bytes()
                digest.update(f"{package} {path.relative_to(Path(file).parent)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def version(package: str) -> str:
    """Of an installed package; empty without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def machine(config: CompileConfig) -> dict[str, Any]:
    """What code is generated for, and what steers the generators from outside."""
    if config.formats == ("mlir",):
        return {"machine": platform.machine(), "level": best_level().name, "compiler": compiler()}
    import torch._inductor.config as inductor

    asked = {k: v for k, v in os.environ.items() if k.startswith(SWITCHES) and k not in NOT_SWITCHES}
    options = inductor.save_config_portable()
    return {
        "processor": aoti.requirement(config.target or "cpu"),
        "threads": torch.get_num_threads(),
        "environment": asked,
        "tuned": {path.name: path.read_text(errors="replace") for path in cache_folder("tuned").glob("*.json")},
        "inductor": {name: repr(value) for name, value in sorted(options.items())},
    }
