"""Runs that can be compared: prefill and greedy decoding with everything the artifact shows kept.

Letters: B batch, S positions (prompt and fed tokens), N = steps + 1 next-token rows, V vocabulary, K experts per token,
W = key/value heads * head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsmoe_model.attention import KVCache
from dsmoe_model.moe import MoE
from dsmoe_model.router import Routing
from dsmoe_model.transformer import ModelOutput, Transformer


class RunnerLike(Protocol):
    """What a runner of an artifact offers; `EagerRunner` offers the same."""

    @property
    def batch_size(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    def new_cache(self) -> KVCache: ...
    def prefill(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, Sequence[Tensor] | Tensor]: ...
    def decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, Sequence[Tensor] | Tensor]: ...


class EagerRunner:
    """The oracle behind a runner's interface."""

    def __init__(self, model: Transformer, *, batch_size: int, capacity: int) -> None:
        self.model, self.batch_size, self.capacity = model, batch_size, capacity

    def new_cache(self) -> KVCache:
        """An empty cache in the model's dtype, on its device."""
        weight = self.model.embed_tokens.weight
        return KVCache.zeros(self.model.config, self.batch_size, self.capacity, weight.dtype, weight.device)

    def prefill(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        """Logits `[B, V]` of the last position and the experts `[B*S, K]` of every layer that routes."""
        return self._last(self.model(ids_BS, cache, last_only=True))

    def decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        """The same for one token at `position`."""
        return self._last(self.model(ids_B1, cache, torch.tensor([position], device=ids_B1.device), last_only=True))

    def _last(self, output: ModelOutput) -> tuple[Tensor, list[Tensor]]:
        return output.logits_BSV[:, -1], [routing.experts_TK for routing in output.routing]


@dataclass(frozen=True)
class Trace:
    """One sequence (per batch row) through prefill and decode."""

    ids_BS: Tensor
    prompt: int
    logits_BNV: Tensor
    experts: list[Tensor]  # [B, S, K] per layer that routes
    key: list[Tensor]  # [B, S, W] per layer
    value: list[Tensor]
    strays: int  # cache slots after the sequence that changed

    @property
    def steps(self) -> int:
        """Decode steps after the prefill."""
        return self.ids_BS.shape[1] - self.prompt


@torch.no_grad()
def run(runner: RunnerLike, prompt_BS: Tensor, cache: KVCache, *, steps: int, tokens_BN: Tensor | None = None) -> Trace:
    """Prefill `prompt_BS`, then decode `steps` tokens: the greedy ones, or those given.

    Following another's tokens keeps both on the same sequence after a step at which they would part.
    """
    ids, logits, routed = prompt_BS, [], []
    prompt = prompt_BS.shape[1]
    after = [
        (key[:, :, prompt + steps :].clone(), value[:, :, prompt + steps :].clone()) for key, value in _slots(cache)
    ]
    for step in range(steps + 1):
        logits_BV, experts = (
            runner.prefill(ids, cache) if step == 0 else runner.decode(ids[:, -1:], prompt + step - 1, cache)
        )
        logits.append(logits_BV.clone())
        routed.append([experts_TK.unflatten(0, (prompt_BS.shape[0], -1)) for experts_TK in experts])
        if step < steps:
            token_B = logits_BV.argmax(dim=-1) if tokens_BN is None else tokens_BN[:, step]
            ids = torch.cat((ids, token_B[:, None]), dim=1)
    strays = 0
    for (key, value), (key_before, value_before) in zip(_slots(cache), after, strict=True):
        changed = (key[:, :, prompt + steps :] != key_before).any(dim=-1)
        strays += int((changed | (value[:, :, prompt + steps :] != value_before).any(dim=-1)).sum())
    return Trace(
        ids_BS=ids,
        prompt=prompt,
        logits_BNV=torch.stack(logits, dim=1),
        experts=[torch.cat(layer, dim=1) for layer in zip(*routed, strict=True)],
        key=[cache_rows(key, prompt + steps) for key in cache.key],
        value=[cache_rows(value, prompt + steps) for value in cache.value],
        strays=strays,
    )


def _slots(cache: KVCache) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(cache.key, cache.value, strict=True)


def cache_rows(slots_BHCD: Tensor, end: int) -> Tensor:
    """The first `end` slots of one layer's keys or values as `[B, end, W]`, copied."""
    return slots_BHCD[:, :, :end].transpose(1, 2).flatten(2).clone()


@dataclass(frozen=True)
class Call:
    """One call of a mixture-of-experts layer of the eager model."""

    x_TH: Tensor
    token_ids_T: Tensor
    y_TH: Tensor
    routing: Routing


@contextmanager
def recorded(layers: Sequence[MoE]) -> Iterator[list[list[Call]]]:
    """While open, every call of `layers` is kept: one list per layer."""
    calls: list[list[Call]] = [[] for _ in layers]

    def keep(index: int) -> Callable[[MoE, tuple[Tensor, ...], tuple[Tensor, Routing]], None]:
        def hook(_module: MoE, args: tuple[Tensor, ...], output: tuple[Tensor, Routing]) -> None:
            y_TH = output[0].reshape(-1, output[0].shape[-1])
            calls[index].append(Call(args[0].reshape(y_TH.shape), args[1].reshape(-1), y_TH, output[1]))

        return hook

    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
