"""Our own candidate: compile the model, run it from the artifact, and read its manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dsmoe_compiler import api
from dsmoe_compiler.compare.candidates import Absent, Compiled
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.loading import Loaded
from dsmoe_compiler.runner import Runner
from dsmoe_model.transformer import Transformer
from dsmoe_runtime.errors import TargetError


@contextmanager
def compiled(loaded: Loaded, *, capacity: int, tell: Callable[[str], None]) -> Iterator[tuple[Runner, float]]:
    """The runner of a freshly compiled, verified artifact that is thrown away afterwards, and the seconds it took.

    The seconds are from model to loaded code; the proof, which no other candidate has, is not counted.
    """
    begin = time.perf_counter()
    config = CompileConfig(target=loaded.model.norm.weight.device.type, max_seq_len=capacity)
    artifact = api.compile(loaded, config=config, progress=tell)
    try:
        runner = artifact.runner()
        proof = (artifact.manifest.get("verification") or {}).get("seconds", 0.0)
        yield runner, time.perf_counter() - begin - proof
    finally:
        artifact.discard()


def through_mlir(model: Transformer, *, batch: int, capacity: int) -> Compiled:
    """The model in format mlir, on the CPU, from an artifact that is gone by the time it runs. Raises: Absent."""
    if model.norm.weight.device.type != "cpu":
        raise Absent("format mlir is for the CPU")
    begin = time.perf_counter()
    config = CompileConfig(formats=("mlir",), max_seq_len=capacity, batch_size=batch, verify=False)
    try:
        artifact = api.compile(model, config=config)
    except TargetError as error:
        raise Absent(str(error)) from None
    try:
        return Compiled(artifact.runner(), "mlir", time.perf_counter() - begin)
    finally:
        artifact.discard()


def facts_of(runner: Any) -> tuple[tuple[dict[str, Any], ...], dict[str, Any] | None]:
    """The layers with what they were fused to, and the verification, as the artifact's manifest has them."""
    manifest = runner.manifest
    return tuple(manifest.get("layers", ())), manifest.get("verification")
