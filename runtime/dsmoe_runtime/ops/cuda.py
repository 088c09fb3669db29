"""An operator on CUDA: the Triton kernels of its name, or the plain-torch rule where they cannot serve, said once.

The kernels of `dsmoe::NAME` are `dsmoe_runtime.kernels.NAME.NAME`, a function with the rule's signature. Triton is
optional, so they are imported at the first call on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dsmoe_runtime.ops.library import LIBRARY

log = logging.getLogger(__name__)
Refusal = Callable[..., str | None]
OLDEST = (8, 0)  # compute capability: bfloat16 in tensor cores, asynchronous copies
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REFUSALS: dict[str, Refusal | None] = {}


def register_cuda(
    name: str, rule: Callable[..., Any], refusal: Refusal | None = None, check: Callable[..., None] | None = None
) -> None:
    """On CUDA run `dsmoe::name` by its kernels, else, for the reason that `why_not` gives, by `rule`.

    refusal: what the kernels cannot do with the operator's arguments, or None; it is asked on a GPU only.
    check: raises for arguments that do not fit each other, as the rule does: a kernel would read beyond them.
    """

    def on_cuda(*arguments: Any) -> Any:
        if check is not None:
            check(*arguments)
        reason = why_not(name, arguments)
        if reason is None:
            return kernels(name)(*arguments)
        _say(name, reason)
        return rule(*arguments)

    LIBRARY.impl(name, on_cuda, "CUDA")
    _REFUSALS[name] = refusal


def has_kernels(name: str) -> bool:
    """Whether `dsmoe::name` is registered for CUDA at all."""
    return name in _REFUSALS


@cache
def kernels(name: str) -> Callable[..., Any]:
    """The function that launches the kernels of `dsmoe::name`."""
    return getattr(import_module(f"dsmoe_runtime.kernels.{name}"), name)  # type: ignore[no-any-return]


def why_not(name: str, arguments: tuple[Any, ...]) -> str | None:
    """Why `dsmoe::name` runs the plain-torch rule for these arguments on CUDA, or None: its kernels run.

    The arguments may be fake tensors. There are four reasons: no kernels or no Triton, a GPU that is too old, a dtype
    (float64), and what the kernels themselves refuse.
    """
    if not has_kernels(name):
        return "it has no kernels"
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    reason = _unable(tensors[0].device)
    if reason:
        return reason
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"{str(tensor.dtype).removeprefix('torch.')} has no kernels"
    refusal = _REFUSALS[name]
    return refusal(*arguments) if refusal else None


def architecture(device: torch.device) -> str:
    """What the kernels are compiled for, such as "sm_90"; "" where there is no GPU to ask."""
    if not torch.cuda.is_available():
        return ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def _unable(device: torch.device) -> str | None:
    """Why no kernel of ours can run on a GPU. Without one a graph may still be made for it: None then."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST:
        return f"{architecture(device)} is older than sm_{OLDEST[0]}{OLDEST[1]}"
    return None


@cache
def _say(name: str, reason: str) -> None:
    log.warning("dsmoe::%s runs as plain torch on the GPU, which is slow: %s", name, reason)
