"""Prefill and decode of a transformers model, with a cache of fixed size that is handed in and written in place.

B sequences, S prompt tokens, V vocabulary, C cache slots, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dsmoe_compiler.huggingface.folder import Pretrained, experts_run_as
from dsmoe_compiler.phases import traced_prompt
from dsmoe_compiler.runner import Shapes
from dsmoe_model.attention import KVCache
from dsmoe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Cache


class Prefill(nn.Module):
    """`(ids [B, S], keys, values)` -> `(logits [B, V] of the last position, an empty tensor)`; S is free.

    The place of the second is for the experts, which only the fused graph tells of.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
        cache = cache_of(prompt_layer, keys, values)
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1], ids.new_empty(0, ids.numel(), 0)


class Decode(nn.Module):
    """`(ids [B, 1], position [1], keys, values)` -> the same two, for that token, written at `position`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, position: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
        cache = cache_of(step_layer, keys, values, position)
        options = {"past_key_values": cache, "position_ids": position[None].expand(ids.shape), "use_cache": True}
        return self.model(input_ids=ids, logits_to_keep=1, **options).logits[:, -1], ids.new_empty(0, ids.numel(), 0)


PHASES: dict[str, type[Prefill | Decode]] = {"prefill": Prefill, "decode": Decode}


def cache_of(
    layer: Callable[[int], Any], keys: list[Tensor], values: list[Tensor], position: Tensor | None = None
) -> Cache:
    """transformers' cache on tensors that are there: `[B, heads, C, width]`, one pair a layer."""
    from transformers import Cache

    layers = []
    for key, value in zip(keys, values, strict=True):
        made = layer(key.shape[2])
        made.keys, made.values, made.is_initialized = key, value, True
        made.dtype, made.device = key.dtype, key.device
        made.batch_size, made.num_heads, _, made.k_head_dim = key.shape
        made.v_head_dim = value.shape[-1]
        if position is not None:
            made.cumulative_length = position
        layers.append(made)
    return Cache(layers=layers)


def prompt_layer(capacity: int) -> Any:
    """A layer that reads a whole prompt: it attends to the prompt itself, not to slots that are still empty."""
    from transformers.cache_utils import StaticLayer

    class PromptLayer(StaticLayer):
        keys: Any
        values: Any

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            place = torch.arange(key_states.shape[-2], device=key_states.device)
            self.keys.index_copy_(2, place, key_states)
            self.values.index_copy_(2, place, value_states)
            return key_states, value_states

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return query_length, 0

        def get_seq_length(self) -> int:
            return 0

    return PromptLayer(max_cache_len=capacity)


def step_layer(capacity: int) -> Any:
    """A layer that adds one token at `cumulative_length`, which the caller moves on."""
    from transformers.cache_utils import StaticLayer

    class StepLayer(StaticLayer):
        keys: Any
        values: Any

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.keys.index_copy_(2, self.cumulative_length, key_states)
            self.values.index_copy_(2, self.cumulative_length, value_states)
            return self.keys, self.values

    return StepLayer(max_cache_len=capacity)


@torch.no_grad()
def cache_shapes(pretrained: Pretrained, *, batch: int, capacity: int) -> Shapes:
    """What each layer keeps for `capacity` positions, seen by running the model on two tokens.

    Raises: ConfigError for a layer that keeps something else than keys and values: no artifact can be made of it.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    model = pretrained.model
    cache = DynamicCache(config=model.config)
    with experts_run_as(model, "batched_mm"):  # the one that runs on the meta device
        model(torch.zeros(1, 2, dtype=torch.int64, device=pretrained.device), past_key_values=cache, use_cache=True)
    shapes = []
    for number, layer in enumerate(cache.layers):
        kind = type(layer).__name__
        if not isinstance(layer, DynamicLayer) or "Linear" in kind or "Indexed" in kind or layer.keys is None:
            raise ConfigError(
                f"layer {number} of {type(model).__name__} keeps a {kind}, not only keys and values: artifacts have no "
                'place for that. torch.compile(model, backend="dsmoe") runs such a model'
            )
        sides: Any = (layer.keys.shape, layer.values.shape)  # type: ignore[union-attr]
        shapes.append(tuple((batch, side[1], capacity, side[3]) for side in sides))
    return shapes  # type: ignore[return-value]


def empty_cache(shapes: Shapes, dtype: torch.dtype, device: torch.device | str) -> KVCache:
    """Zeros of these shapes."""
    keys, values = zip(*shapes, strict=True)
    return KVCache(*([torch.zeros(s, dtype=dtype, device=device) for s in side] for side in (keys, values)))


def example_inputs(pretrained: Pretrained, name: str, shapes: Shapes) -> tuple[tuple[Any, ...], Any]:
    """Inputs to trace the phase `name` with, and which of their dimensions are free."""
    cache = empty_cache(shapes, pretrained.dtype, pretrained.device)
    batch, capacity = shapes[0][0][0], shapes[0][0][2]
    length = traced_prompt(capacity, pretrained.device) if name == "prefill" else 1
    ids = torch.zeros(batch, length, dtype=torch.int64, device=pretrained.device)
    fixed = [None] * len(shapes)
    if name == "prefill":
        return (ids, cache.key, cache.value), ({1: torch.export.Dim.DYNAMIC} if capacity > 1 else None, fixed, fixed)
    position = torch.zeros(1, dtype=torch.int64, device=pretrained.device)
    return (ids, position, cache.key, cache.value), (None, None, fixed, fixed)
