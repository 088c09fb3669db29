"""Peak memory of a call: resident set on the CPU (Linux), allocator high-water mark on CUDA."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """`peak_bytes`: the most the process (CPU) or the allocator (CUDA) held; `working_bytes`: what the call added.

    All candidates live in one process, so only `working_bytes` belongs to a candidate alone.
    """

    peak_bytes: int
    working_bytes: int


def peak_memory(call: Callable[[], object], device: torch.device) -> Memory | None:
    """Run `call` once and measure; None where the platform has no resettable high-water mark."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return Memory(peak_bytes=peak, working_bytes=peak - before)
    _return_free_heap()
    try:
        _CLEAR.write_text("5")  # resets VmHWM, man 5 proc
    except OSError:
        call()
        return None
    before = _resident("VmRSS")
    call()
    peak = _resident("VmHWM")
    return Memory(peak_bytes=peak, working_bytes=max(0, peak - before))


def available_bytes(device: torch.device) -> int | None:
    """What could still be allocated on `device`, None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _return_free_heap() -> None:
    """Give what malloc keeps back to the system (glibc), or a call would seem to need no memory that another left."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
