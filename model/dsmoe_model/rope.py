"""Rotary position embeddings in the rotate-half form of Llama and the official checkpoints.

Letters: B batch, S positions, A heads, D head width. The tables hold no state: they follow from positions and theta, in
float32 (float64 for a float64 model), so that casting the model cannot round the frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(position_S: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin `[S, D]` for integer positions `[S]`, rounded to `dtype` at the end only."""
    exact = torch.promote_types(dtype, torch.float32)
    even = torch.arange(0, head_dim, 2, device=position_S.device).to(exact)
    angle = position_S.to(exact)[:, None] * (1.0 / theta ** (even / head_dim))[None, :]
    angle_SD = torch.cat((angle, angle), dim=-1)
    return angle_SD.cos().to(dtype), angle_SD.sin().to(dtype)


def rotate(x_BASD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of every head by its position's angle."""
    first, second = x_BASD.chunk(2, dim=-1)
    return x_BASD * cos_SD + torch.cat((-second, first), dim=-1) * sin_SD
