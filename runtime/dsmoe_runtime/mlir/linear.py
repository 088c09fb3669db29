"""nn.Linear on the CPU by our own kernels: y = x w^T + bias."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsmoe_runtime.errors import InputError
from dsmoe_runtime.mlir.formats import type_of
from dsmoe_runtime.mlir.kernel import Kernel, kernel
from dsmoe_runtime.mlir.levels import Level, best_level
from dsmoe_runtime.mlir.linear_lowering import LinearSpec, linear_function


def linear(
    x: Tensor, w: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None, level: Level | None = None
) -> Tensor:
    """`x [M, K]`, `w [N, K]`, `bias [N]` or None -> `[M, N]` in `dtype`, by default x's; sums are float32."""
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1] or x.dtype != w.dtype:
        raise InputError(f"x is {x.dtype} {tuple(x.shape)} and w {w.dtype} {tuple(w.shape)}; want [M, K] and [N, K]")
    if bias is not None and bias.shape != w.shape[:1]:
        raise InputError(f"bias is {tuple(bias.shape)}; w {tuple(w.shape)} wants {tuple(w.shape[:1])}")
    spec = LinearSpec(
        type_of(x.dtype),
        type_of(dtype or x.dtype),
        None if bias is None else type_of(bias.dtype),
        level or best_level(),
    )
    y = x.new_empty(x.shape[0], w.shape[0], dtype=dtype or x.dtype)
    linear_kernel(spec)([in_rows(x), in_rows(w), *([] if bias is None else [bias.contiguous()]), y])
    return y


def in_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if values of a row lie side by side, else a copy in which they do."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.cache
def linear_kernel(spec: LinearSpec) -> Kernel:
    """Its compiled code."""
    return kernel(linear_function(spec), spec.level)
