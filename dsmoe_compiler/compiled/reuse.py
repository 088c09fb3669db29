"""A whole compile, kept and taken out again: code and reports from the cache, weights from the model at hand.

    compile       capture, passes, code, weights           -> Built, and an entry in the cache
    compile       the same model again                     -> Built, without capture or code generation

An entry holds no weight: it says which of the model's tensors stand where. See `key` for what makes two models one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from dsmoe_compiler.capture import MOE_OP, Capture
from dsmoe_compiler.compiled import entries
from dsmoe_compiler.compiled.fingerprint import Unusual
from dsmoe_compiler.compiled.key import key_of
from dsmoe_compiler.compiled.recipes import build, fetch, operand_values, operands, recipe
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.targets.aoti import PhaseReport
from dsmoe_compiler.targets.weights import WEIGHTS, stored_weights, write_shards
from dsmoe_compiler.verify import FusedLayer
from dsmoe_model.moe import MoE
from dsmoe_model.transformer import Transformer
from dsmoe_runtime.errors import TargetError

log = logging.getLogger(__name__)
FROM_CACHE = {"capture_seconds": 0.0, "from_cache": True}


@dataclass
class Built:
    """What packaging gave: reports of packages, manifest entries, what it takes to run, and the layers to be proved."""

    phases: dict[str, PhaseReport]
    facts: dict[str, Any]
    processor: dict[str, Any] | None
    layers: list[FusedLayer]


def key_if_cached(model: Transformer, config: CompileConfig, capacity: int) -> str | None:
    """The key of this compile, or None where nothing is kept of it; a model that is not cached is told why."""
    if not entries.limit() or config.debug:
        return None
    try:
        return key_of(model, config, capacity)
    except Unusual as why:
        log.info("what is compiled now is not cached: %s", why)
    except TargetError:  # this machine cannot run the target, and compiling will say so
        pass
    return None


def reuse(key: str, model: Transformer, folder: Path, progress: Callable[[str], None]) -> Built | None:
    """The compile of that key, its files in `folder`, the weights of `model` beside them; None if it is not there."""
    start = time.perf_counter()
    said = entries.read(key, folder)
    if said is None:
        return None
    stored = {name: build(made, model) for name, made in said["weights"].items()}
    write_shards(stored, folder / WEIGHTS, progress=progress)
    phases = {name: PhaseReport(**report) for name, report in said["phases"].items()}
    layers = [_layer(model, name, found) for name, found in said["layers"].items()]
    progress(f"cache: nothing to capture or compile, {time.perf_counter() - start:.1f} s")
    return Built(phases, said["facts"] | FROM_CACHE, said["processor"], layers)


def keep(key: str, built: Built, capture: Capture, folder: Path, files: list[str]) -> None:
    """Put a compile, `files` of `folder`, into the cache, if it is whole and its weights can be found again."""
    missing = built.facts.get("mlir", {}).get("library", {}).get("missing")
    if missing:  # mended from outside, and then a compile shall try again
        log.info("what was compiled is not cached: it has no library (%s)", missing)
        return
    try:
        said = _describe(built, capture)
    except Unusual as why:
        log.info("what was compiled is not cached: %s", why)
        return
    entries.write(key, said, [name for name in files if not name.startswith(f"{WEIGHTS}/")], folder)


def _describe(built: Built, capture: Capture) -> dict[str, Any]:
    model, graphs = capture.model, capture.graphs
    stored, names = stored_weights(graphs)
    weights: dict[str, Any] = dict.fromkeys(stored)
    for phase, targets in names.items():
        for target, name in targets.items():
            weights[name] = recipe(graphs[phase], target, model)
    last = list(graphs.values())[-1]
    return {
        "phases": {name: report.to_dict() for name, report in built.phases.items()},
        "facts": built.facts,
        "processor": built.processor,
        "weights": weights,
        "layers": {name: operands(last, node, model) for name, node in fused_operators(capture).items()},
    }


def fused_operators(capture: Capture) -> dict[str, fx.Node]:
    """Layer -> the one `dsmoe::moe` that it became, in the last phase's graph."""
    found = capture.operators().items()
    return {n: node for n, node in found if node.target is MOE_OP and isinstance(capture.model.get_submodule(n), MoE)}


def fused_layers(capture: Capture) -> list[FusedLayer]:
    """The layers that became one `dsmoe::moe`, each as a function of its tokens with the weights in the graph."""
    graph = list(capture.graphs.values())[-1]
    return [
        _fused(name, capture.model.get_submodule(name), values_of(graph, node))
        for name, node in fused_operators(capture).items()
    ]


def values_of(graph: fx.GraphModule, node: fx.Node) -> list[Any]:
    """The operands of a `dsmoe::moe` but its tokens."""
    return [fetch(graph, str(one.target)) if isinstance(one, fx.Node) else one for one in node.args[1:]]


def _layer(model: Transformer, name: str, found: list[dict[str, Any]]) -> FusedLayer:
    return _fused(name, model.get_submodule(name), operand_values(found, model))


def _fused(name: str, module: nn.Module, values: list[Any]) -> FusedLayer:
    assert isinstance(module, MoE)
    alone = None if values[-2] is None else partial(_run, [*values[:-3], None, None, None])
    return FusedLayer(name, module, partial(_run, values), alone)


def _run(values: list[Any], x: Tensor) -> tuple[Tensor, Tensor]:
    return MOE_OP(x, *values)  # type: ignore[no-any-return]
