"""How a kernel is launched: eagerly, chained to the kernel before it where the GPU can, or as a node of a graph."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def chained(device: torch.device) -> bool:
    """Whether kernels on `device` may start before the one ahead has ended (programmatic dependent launch, sm_90)."""
    return not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def upcast(dtype: torch.dtype) -> bool:
    """Whether operands of `tl.dot` must be float32: Triton's interpreter multiplies the raw bits of bfloat16."""
    return INTERPRETED and dtype == torch.bfloat16


def tracing() -> bool:
    """Whether the launch is being recorded into a graph (torch.export, AOTInductor) and not run."""
    return (
        torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, pdl: bool = False, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`; `pdl`: start early and wait inside, at the kernel's own `gdc_wait`.

    In a graph the kernel is a node of its own, whose binary AOTInductor puts into the package. There it starts late,
    which changes nothing but time: the wait is inline assembly, for which torch would take every tensor for written,
    and copy the weights.
    """
    if tracing():
        meta |= {"PDL": False} if "PDL" in meta else {}
        torch.library.wrap_triton(kernel)[grid](*args, **meta)
    elif pdl:
        kernel[grid](*args, **meta, launch_pdl=True)
    else:
        kernel[grid](*args, **meta)
