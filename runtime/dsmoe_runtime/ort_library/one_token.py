"""What the host parts of operators for one token take and launch, on tensors without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ort_library.layer import DecodeAttention, Gemv, OneToken, float32


def inputs(kind: OneToken) -> dict[str, Tensor]:
    """The operator's inputs by their names, in their order."""
    if isinstance(kind, Gemv):
        shapes: dict[str, Any] = {"x": (1, kind.depth), "weight": (kind.rows, kind.depth)}
    else:
        angles, cache = (kind.positions, kind.width // 2), (1, kind.groups, kind.slots, kind.width)
        joint = (1, 1, (kind.heads + 2 * kind.groups) * kind.width)
        shapes = {"qkv": joint, "cos": angles, "sin": angles, "position": (1,), "past_key": cache, "past_value": cache}
    dtypes = {"position": torch.int64}
    own = getattr(torch, kind.dtype)
    return {n: torch.empty(shapes[n], dtype=dtypes.get(n, own), device="meta") for n in kind.inputs}


def launched(kind: OneToken, given: dict[str, Any]) -> dict[str, Tensor]:
    """The operator's outputs by their names; what is written in place are new ones, which the library has filled."""
    from dsmoe_runtime.kernels import decode_attention, gemv

    if isinstance(kind, Gemv):
        return {"y": gemv.gemv(given["x"], [given["weight"]])}
    reason = decode_attention.refusal(kind.heads, kind.groups, kind.width)
    if reason is not None:
        raise TargetError(f"there are no kernels for {kind.key()}: {reason}")
    key, value = torch.empty_like(given["past_key"]), torch.empty_like(given["past_value"])
    qkv, cos, sin, position = (given[name] for name in DecodeAttention.inputs[:4])
    y = decode_attention.decode_attention(qkv, cos, sin, position, key, value, float32(kind.scale))
    return {"y": y, "present_key": key, "present_value": value}
