"""The proof of an ONNX model on its provider: the checks of every artifact, by two sessions with other sizes.

One session has one thread and reads single sequences, so that one token alone goes through every layer; another has two
threads and reads three sequences at a time. Neither number was in the trace. Both run what a user's session will run:
the library where the artifact holds one, else the functions in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.targets.onnx.runner import OnnxRunner
from dsmoe_compiler.verify import PROMPTS, STEPS, Verification
from dsmoe_compiler.verify.trace import RunnerLike
from dsmoe_model.attention import KVCache

SESSIONS = ((1, 1), (2, 3))  # threads, sequences
POSITIONS = max(PROMPTS) + max(STEPS) + 4
Check = Callable[[RunnerLike, CompileConfig, Callable[[str], None]], Verification]


def prove(
    opened: Callable[[int], OnnxRunner], check: Check, config: CompileConfig, progress: Callable[[str], None]
) -> Verification:
    """Every check for every session; `opened(threads)` opens one. Raises nothing for a difference."""
    found: list[Verification] = []
    for threads, batch in SESSIONS:
        where = f"{threads} thread{'s' * (threads > 1)}, {batch} row{'s' * (batch > 1)}"

        def say(step: str, where: str = where) -> None:
            progress(f"verify: {step.removeprefix('verify: ')} ({where})")

        result = check(Slots(opened(threads), batch), config, say)
        checks = tuple(replace(one, name=f"{one.name} ({where})") for one in result.checks)
        found.append(replace(result, checks=checks))
    return replace(
        found[0],
        checks=tuple(one for result in found for one in result.checks),
        first_diverging_layer=next((r.first_diverging_layer for r in found if r.first_diverging_layer), None),
        seconds=sum(result.seconds for result in found),
    )


class Slots:
    """An ONNX runner for so many rows behind the interface of one with a fixed cache, as the checks expect it."""

    def __init__(self, runner: OnnxRunner, batch: int) -> None:
        self.runner, self.batch_size = runner, batch
        self.capacity = min(runner.capacity, POSITIONS)

    def new_cache(self) -> KVCache:
        """Zeros of `batch_size` rows and `capacity` positions."""
        runner = self.runner
        keys, values = (
            [
                torch.zeros(self.batch_size, pair[side][1], self.capacity, pair[side][3], dtype=runner.dtype)
                for pair in runner.shapes
            ]
            for side in (0, 1)
        )
        return KVCache(*([t.to(runner.device) for t in side] for side in (keys, values)))

    def prefill(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        grown = self.runner.new_cache()
        answer = self.runner.prefill(ids_BS, grown)
        return self._kept(answer, grown, cache)

    def decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, Tensor]:
        grown = KVCache(*([t[:, :, :position].clone() for t in side] for side in (cache.key, cache.value)))
        answer = self.runner.decode(ids_B1, position, grown)
        return self._kept(answer, grown, cache)

    def _kept(self, answer: tuple[Tensor, Tensor], grown: KVCache, cache: KVCache) -> tuple[Tensor, Tensor]:
        for slots, now in zip((*cache.key, *cache.value), (*grown.key, *grown.value), strict=True):
            slots[:, :, : now.shape[2]] = now
        return answer
