"""The proof of an ONNX model on its provider: the checks of every artifact, by two sessions with other sizes.

One session has one thread and reads single sequences, so that one token alone goes through every layer; another has two
threads and reads three sequences at a time. Neither number was in the trace. Both run what a user's session will run:
the library where the artifact holds one, else the functions in the file. Where there is a decode.onnx, a third round of
checks sends single tokens through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.targets.onnx.opening import DECODE
from dsmoe_compiler.targets.onnx.runner import OnnxRunner, in_turn
from dsmoe_compiler.verify import PROMPTS, STEPS, Verification
from dsmoe_compiler.verify.result import Check
from dsmoe_compiler.verify.trace import RunnerLike
from dsmoe_model.attention import KVCache

SESSIONS = ((1, 1), (2, 3))  # threads, sequences
POSITIONS = max(PROMPTS) + max(STEPS) + 4
Checking = Callable[[RunnerLike, CompileConfig, Callable[[str], None]], Verification]


def prove(
    opened: Callable[[int], OnnxRunner], check: Checking, config: CompileConfig, progress: Callable[[str], None]
) -> Verification:
    """Every check for every session; `opened(threads)` opens one. Raises nothing for a difference."""
    found: list[Verification] = []
    for where, slots in rounds(opened):

        def say(step: str, where: str = where) -> None:
            progress(f"verify: {step.removeprefix('verify: ')} ({where})")

        result = check(slots, config, say)
        checks = tuple(replace(judged(one, config), name=f"{one.name} ({where})") for one in result.checks)
        found.append(replace(result, checks=checks))
        del slots  # the next one's weights take the memory
    return replace(
        found[0],
        checks=tuple(one for result in found for one in result.checks),
        first_diverging_layer=next((r.first_diverging_layer for r in found if r.first_diverging_layer), None),
        seconds=sum(result.seconds for result in found),
    )


def rounds(opened: Callable[[int], OnnxRunner]) -> Iterator[tuple[str, Slots]]:
    """What is checked, one after the other, so that the weights are in memory once, and what to call it."""
    for threads, batch in SESSIONS:
        runner = opened(threads)
        yield f"{threads} thread{'s' * (threads > 1)}, {batch} row{'s' * (batch > 1)}", Slots(runner, batch)
        if runner.one_token is not None and batch == 1:
            yield DECODE, OneSequence(runner, 1)
        del runner


def judged(check: Check, config: CompileConfig) -> Check:
    """A check, but for the bits of an operator that does not promise them: on CUDA, com.microsoft.MoE's differ."""
    if check.ok or check.name != "repeat" or (config.profile, config.target) != ("ort-contrib", "cuda"):
        return check
    return replace(check, ok=True, detail=f"{check.detail}, as com.microsoft.MoE's may; its values are judged above")


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


class OneSequence(Slots):
    """Slots whose single tokens go through decode.onnx."""

    def decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, Tensor]:
        one, slots = self.runner.one_token, in_turn(cache)
        assert one is not None
        one.fill([tensor[:, :, :position] for tensor in slots])
        answer = one(ids_B1, position)
        for tensor, now in zip(slots, one.cache, strict=True):
            tensor[:, :, position] = now[:, :, position]
        return answer
