"""dsmoe::attend: one new token's attention over the slots of a cache that a mask lets it see.

No model spells it: the compiler puts it into a decode step of one sequence on a GPU (`targets/one_token.py`), where
the libraries read all slots, seen or not, with a program for each head. A heads, C slots, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmoe_runtime.errors import InputError
from dsmoe_runtime.ops.cuda import register_cuda
from dsmoe_runtime.ops.library import refuse_backward, register


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> None:
    sizes = tuple(query.shape), tuple(key.shape)
    heads, width, slots = query.shape[1:2], query.shape[-1:], key.shape[2:3]
    if sizes != ((1, *heads, 1, *width), (1, *heads, *slots, *width)) or value.shape != key.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise InputError(f"dsmoe::attend takes query [1, A, 1, D], key and value [1, A, C, D], not {shapes}")
    if mask.dtype != torch.bool or mask.numel() != key.shape[2]:
        found = f"{mask.dtype} {tuple(mask.shape)}"
        raise InputError(f"the mask must have a bool for each of {key.shape[2]} slots; it is {found}")


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The rule of dsmoe::attend: `[1, A, 1, D]` in the dtype of `query`.

    Args:
        query: `[1, A, 1, D]`. key, value: `[1, A, C, D]`, each head its own; any strides.
        mask: bool, C values in all: the slots to see, at least one of them. The others are not read.
        scale: what the products are multiplied with before the softmax.

    Raises: InputError.
    """
    _check(query, key, value, mask, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.reshape(1, -1), scale=scale)


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    _check(query, key, value, mask, scale)
    return query.new_empty(query.shape)


def _refusal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> str | None:
    from dsmoe_runtime.kernels.attend import refusal

    return refusal(query, key, value)


register("attend(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor", attend, _fake)
refuse_backward("attend", "a decode step is inference. Differentiate scaled_dot_product_attention")
register_cuda("attend", attend, _refusal, check=_check)
