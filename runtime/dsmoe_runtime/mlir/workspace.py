"""Memory that a kernel works in: one block for each Python thread, kept and grown, so no call faults pages anew."""

from __future__ import annotations

import math
import threading

import torch

_LINE = 64  # bytes of a cache line
_own = threading.local()


class Workspace:
    """What one call needs, laid out: first `take` all of it, then ask for the `address`."""

    def __init__(self) -> None:
        self._size = 0

    def take(self, *sizes: int, element: int = 8) -> tuple[int, ...]:
        """Room for so many elements -> its offset in bytes, then the sizes."""
        offset = self._size
        self._size += -(-math.prod(sizes) * element // _LINE) * _LINE
        return offset, *sizes

    def address(self) -> int:
        """Of a block that is large enough; it is overwritten by the next call on this thread."""
        block = getattr(_own, "block", None)
        if block is None or block.numel() < self._size + _LINE:
            _own.block = block = torch.empty(self._size + self._size // 4 + _LINE, dtype=torch.uint8)
        start: int = block.data_ptr()
        return -(-start // _LINE) * _LINE
