"""dsmoe::gemv: one row times the transposes of one to three matrices, side by side.

No model spells it: the compiler puts it into a decode step of one sequence on a GPU (`targets/one_token.py`), where
the libraries' products of one row leave most of the memory's speed unused. K values in, N_i out of weight i.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmoe_runtime.errors import InputError
from dsmoe_runtime.ops.cuda import DTYPES, register_cuda
from dsmoe_runtime.ops.library import refuse_backward, register

MOST = 3  # weights: queries, keys and values


def _check(x: Tensor, weights: list[Tensor]) -> None:
    depth = x.shape[-1]
    if not 1 <= len(weights) <= MOST:
        raise InputError(f"dsmoe::gemv takes 1 to {MOST} weights, not {len(weights)}")
    if x.numel() != depth or any(w.ndim != 2 or w.shape[1] != depth or w.dtype != x.dtype for w in weights):
        found = ", ".join(f"{str(w.dtype).removeprefix('torch.')} {tuple(w.shape)}" for w in weights)
        expected = f"one row x [..., K] and weights [N, K] of its dtype, not {x.dtype} {tuple(x.shape)} and {found}"
        raise InputError(f"dsmoe::gemv takes {expected}")


def gemv(x: Tensor, weights: list[Tensor]) -> Tensor:
    """The rule of dsmoe::gemv: `cat([linear(x, w) for w in weights], -1)`, `[..., N_1 + ...]` in the dtype of `x`.

    Args:
        x: `[..., K]`, one row.
        weights: `[N_i, K]` each. On a GPU they are read before what ran last has ended: it must not have written them.

    Raises: InputError.
    """
    _check(x, weights)
    return torch.cat([F.linear(x, weight) for weight in weights], -1)


def _fake(x: Tensor, weights: list[Tensor]) -> Tensor:
    _check(x, weights)
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


def _refusal(x: Tensor, weights: list[Tensor]) -> str | None:
    if x.dtype not in DTYPES:
        return f"{x.dtype} has no kernels"
    if not all(weight.is_contiguous() for weight in weights):
        return "the values of a weight do not lie side by side"
    return None


register("gemv(Tensor x, Tensor[] weights) -> Tensor", gemv, _fake)
refuse_backward("gemv", "a decode step is inference. Differentiate linear")
register_cuda("gemv", gemv, _refusal, check=_check)
