"""Scaled dot-product attention on the CPU by our own kernels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsmoe_runtime.errors import InputError
from dsmoe_runtime.mlir.attention_lowering import attention_function
from dsmoe_runtime.mlir.attention_place import AttentionSpec
from dsmoe_runtime.mlir.formats import type_of
from dsmoe_runtime.mlir.kernel import Kernel, kernel
from dsmoe_runtime.mlir.levels import Level, best_level
from dsmoe_runtime.mlir.linear import in_rows


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    level: Level | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention: `q [B, Hq, S, D]`, `k [B, Hkv, C, D]`, `v [B, Hkv, C, Dv]`.

    The result is `[B, Hq, S, Dv]`. `mask` is bool or added, and can be expanded to `[B, Hq, S, C]`; `causal`: query s
    sees the slots up to s.
    """
    batch, heads, queries, depth = q.shape
    if k.shape[0] != batch or k.shape[3] != depth or v.shape[:3] != k.shape[:3] or heads % max(1, k.shape[1]):
        raise InputError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; cast two of them")
    if mask is not None and causal:
        raise InputError("a mask and causal exclude each other; put the triangle into the mask")
    kind = "causal" if causal else "none"
    given = [in_rows(tensor) for tensor in (q, k, v)]
    if mask is not None:
        kind = "i1" if mask.dtype == torch.bool else type_of(mask.dtype)
        mask = mask.view(*[1] * (4 - mask.dim()), *mask.shape)
        given.append(in_rows(mask.expand(*mask.shape[:3], k.shape[2])))
    spec = AttentionSpec(type_of(q.dtype), kind, depth**-0.5 if scale is None else scale, level or best_level())
    y = q.new_empty(batch, heads, queries, v.shape[3])
    attention_kernel(spec)([*given, y])
    return y


@functools.cache
def attention_kernel(spec: AttentionSpec) -> Kernel:
    """Its compiled code."""
    return kernel(attention_function(spec), spec.level)
