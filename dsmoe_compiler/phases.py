"""The two programs of a language model: prefill reads a prompt, decode adds one token.

B sequences, S prompt tokens, V vocabulary, L layers with routed experts, K experts per token, C cache slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsmoe_model.attention import KVCache
from dsmoe_model.transformer import ModelOutput, Transformer

TRACED_PROMPT = 8  # any length of at least 2 would do on the CPU: the dimension is symbolic


@dataclass(frozen=True)
class Phase:
    """One program, as targets take it: a graph that holds its parameters, and the inputs it was traced with."""

    name: str
    graph: fx.GraphModule
    inputs: tuple[Any, ...]


class Prefill(nn.Module):
    """`(ids [B, S], keys, values)` -> `(logits [B, V] of the last position, experts [L, B*S, K])`.

    `keys` and `values`, L tensors `[B, Hkv, C, D]` each, are written in place from slot 0. S is free.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
        return last(self.model(ids, KVCache(keys, values), last_only=True), ids)


class Decode(nn.Module):
    """`(ids [B, 1], position [1], keys, values)` -> the same two, for that token. Caches are written at `position`."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, position: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
        return last(self.model(ids, KVCache(keys, values), position, last_only=True), ids)


def last(output: ModelOutput, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The last position's logits, and the experts of all layers in one tensor (empty for a model without any)."""
    chosen = [routing.experts_TK for routing in output.routing]
    experts = torch.stack(chosen) if chosen else ids.new_empty(0, ids.shape[0] * ids.shape[1], 0)
    return output.logits_BSV.squeeze(1), experts


def example_inputs(model: Transformer, name: str, *, batch: int, capacity: int) -> tuple[tuple[Any, ...], Any]:
    """Inputs to trace the phase `name` with, and which of their dimensions are free."""
    parameter = next(model.parameters())
    cache = KVCache.zeros(model.config, batch, capacity, parameter.dtype, parameter.device)
    length = traced_prompt(capacity, parameter.device) if name == "prefill" else 1
    ids = torch.zeros(batch, length, dtype=torch.int64, device=parameter.device)
    fixed = [None] * len(cache.key)
    if name == "prefill":
        free = {1: torch.export.Dim.DYNAMIC} if capacity > 1 else None
        return (ids, cache.key, cache.value), (free, fixed, fixed)
    position = torch.zeros(1, dtype=torch.int64, device=parameter.device)
    return (ids, position, cache.key, cache.value), (None, None, fixed, fixed)


def traced_prompt(capacity: int, device: torch.device) -> int:
    """The prompt's length while tracing. Kernels of a GPU are cut for it: half of what fits is no extreme."""
    return min(max(TRACED_PROMPT, capacity // 2 if device.type == "cuda" else 0), capacity)


PHASES: dict[str, type[Prefill | Decode]] = {"prefill": Prefill, "decode": Decode}
