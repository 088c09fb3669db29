"""Our own candidate: compile the model, run it from the artifact, and read its manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dsmoe_compiler import api
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.loading import Loaded
from dsmoe_compiler.runner import Runner


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


def facts_of(runner: Any) -> tuple[tuple[dict[str, Any], ...], dict[str, Any] | None]:
    """The layers with what they were fused to, and the verification, as the artifact's manifest has them."""
    manifest = runner.manifest
    return tuple(manifest.get("layers", ())), manifest.get("verification")
