"""Tunes the experts of some layers on the GPU that is here, within a time box, and writes down what wins."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dsmoe_compiler.search import Result, tune_cell
from dsmoe_compiler.trial import Trial, Weights
from dsmoe_runtime.errors import TargetError

log = logging.getLogger(__name__)

TOKENS = (1, 16, 64, 512, 4096, 16384)
Sizes = tuple[int, int, int, int, int]  # hidden, width, experts, top_k, shared experts
# What the package has tables for: layers, then routed experts alone. V2-Lite is the 16B's shape.
LAYERS: dict[str, Sizes] = {
    "deepseek-moe-16b": (2048, 1408, 64, 6, 2),
    "deepseek-moe-145b": (4096, 1408, 128, 12, 4),
    "deepseek-v3": (7168, 2048, 256, 8, 1),
    "deepseek-v2": (5120, 1536, 160, 6, 2),
    "deepseek-moe-2b": (1280, 853, 63, 7, 1),
    "deepseek-moe-2b padded": (1280, 864, 63, 7, 1),
    "deepseek-moe-tiny": (256, 192, 32, 4, 2),
    "qwen3-30b-a3b": (2048, 768, 128, 8, 0),
}
LAYERS |= {f"{name} routed": (*sizes[:4], 0) for name, sizes in LAYERS.items() if sizes[4]}


def tune(
    layers: Mapping[str, Sizes],
    *,
    tokens: Sequence[int],
    dtype: str,
    budget: float,
    path: Path | None = None,
    say: Callable[[str], None] = log.info,
) -> tuple[list[Result], Path]:
    """Tune every layer at every number of tokens within `budget` seconds; what is kept is written after each cell.

    Returns the results and the table written to, the user's own if `path` is None. What no time was left for is said
    and not in the results.
    """
    from dsmoe_compiler.compare.conditions import conditions
    from dsmoe_runtime.kernels.choose import bucket, facts, forget
    from dsmoe_runtime.kernels.plan import Shape
    from dsmoe_runtime.kernels.tuned import Entry, store, user_table

    place = torch.device("cuda", torch.cuda.current_device())
    device, made = facts(place), conditions(place)
    path = user_table(device, dtype) if path is None else path
    end, results = time.monotonic() + budget, []
    cells = len(layers) * len(tokens)
    for name, sizes in layers.items():
        weights = None
        for number in tokens:
            left, cells = (end - time.monotonic()) / cells, cells - 1
            shape = Shape(number, *sizes[:4], dtype, sizes[4])
            if left <= 0:
                say(f"{name} T={number}: no time left")
                continue
            stop = time.monotonic() + left
            torch.cuda.empty_cache()  # the graphs of the cell before
            try:
                weights = weights or Weights(shape, place, l2_bytes=device.l2_bytes)
                result = tune_cell(Trial(shape, weights, l2_bytes=device.l2_bytes), shape, device, stop)
            except TargetError as error:
                say(f"{name} T={number}: {error}")
                continue
            results.append(result)
            if result.kept:
                entry_shape = replace(shape, tokens=bucket(number))  # what `choose` will ask for
                store([Entry(entry_shape, result.tuned, result.tuned_us, result.incumbent_us)], device, path, made)
                forget()
            say(
                f"{name} T={number}: {result.incumbent_us:.1f} -> {result.tuned_us:.1f} us, "
                f"{'kept' if result.kept else 'not kept'}: {result.why} ({result.tried} plans, {result.seconds:.1f} s)"
            )
    return results, path
