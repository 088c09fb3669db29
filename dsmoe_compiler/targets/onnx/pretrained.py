"""One step of a transformers model as a function of its cache; see `phase` for what goes in and comes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_compiler.huggingface.phases import cache_of


class PretrainedStep(nn.Module):
    """`(ids [B, S], past)` -> `(logits [B, V], an empty tensor, present)`.

    The place of the second is for the experts, which only the fused graph tells of.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, past: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        cache: Any = cache_of(growing_layer, past[::2], past[1::2])
        length = past[0].shape[2]
        position = torch.arange(length, length + ids.shape[1], device=ids.device)
        logits = self.model(
            input_ids=ids, past_key_values=cache, position_ids=position[None].expand(ids.shape), use_cache=True,
            logits_to_keep=1,
        ).logits  # fmt: skip
        present = [side for layer in cache.layers for side in (layer.keys, layer.values)]
        return logits[:, -1], ids.new_empty(0, ids.numel(), 0), present


def growing_layer(_: int) -> Any:
    """A layer of transformers' cache that keeps everything, also where attention looks at a window only."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        keys: Any

        def get_seq_length(self) -> int:
            return self.keys.shape[-2]  # the base class asks whether it is 0, which tracing would take for never

    return GrowingLayer()
