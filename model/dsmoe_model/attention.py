"""Causal self-attention with grouped key/value heads, and the static cache it writes.

Letters: B batch, S positions, H model width, A query heads, Hkv key/value heads, C cache capacity, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_model.config import ModelConfig
from dsmoe_model.rope import rotate


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, `[B, Hkv, C, D]` each, allocated once and written in place."""

    key: list[Tensor]
    value: list[Tensor]

    @classmethod
    def zeros(
        cls, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> KVCache:
        """An empty cache for `capacity` positions."""
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            [torch.zeros(shape, dtype=dtype, device=device) for _ in layers],
            [torch.zeros(shape, dtype=dtype, device=device) for _ in layers],
        )

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return self.key[0].shape[2]


@dataclass(frozen=True)
class Place:
    """Where the tokens of one call stand, shared by all layers."""

    position_S: Tensor  # int64
    cos_SD: Tensor
    sin_SD: Tensor
    mask_SC: Tensor | None  # decode: the cache slots in sight; None: causal among the tokens of the call


class Attention(nn.Module):
    """`x [B, S, H]` -> `[B, S, H]`. Each key/value head serves a group of query heads (A = Hkv: plain MHA)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, hidden, bias=False)
        self.head_dim = width
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads

    def forward(self, x_BSH: Tensor, where: Place, slots: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Writes keys and values to `slots`, this layer's half of a `KVCache`, when given."""
        query = rotate(self.split(self.q_proj(x_BSH)), where.cos_SD, where.sin_SD)
        key = rotate(self.split(self.k_proj(x_BSH)), where.cos_SD, where.sin_SD)
        value = self.split(self.v_proj(x_BSH))
        if slots is not None:
            slots[0].index_copy_(2, where.position_S, key)
            slots[1].index_copy_(2, where.position_S, value)
            if where.mask_SC is not None:
                key, value = slots
        if self.queries_per_key > 1:
            key = key.repeat_interleave(self.queries_per_key, dim=1)
            value = value.repeat_interleave(self.queries_per_key, dim=1)
        mask_SC = where.mask_SC
        y_BASD = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_SC, is_causal=mask_SC is None)
        return self.o_proj(y_BASD.transpose(1, 2).flatten(2))

    def split(self, x_BSW: Tensor) -> Tensor:
        """`[B, S, heads * D]` -> `[B, heads, S, D]`."""
        return x_BSW.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
