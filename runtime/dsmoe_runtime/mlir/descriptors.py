"""Memref descriptors straight from tensors: pointers, sizes and strides, in numbers; no value is copied."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

# (address, sizes, strides)
Described = tuple[int, Sequence[int], Sequence[int]]


def of_tensor(tensor: Tensor) -> Described:
    """A tensor as it lies in memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def of_memory(address: int, *sizes: int) -> Described:
    """Contiguous memory."""
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return address, sizes, strides


class Arguments:
    """The array of pointers to descriptors that a kernel's entry point takes, with the descriptors it points to."""

    def __init__(self, described: Sequence[Described]) -> None:
        words: list[int] = []
        starts = []
        for address, sizes, strides in described:
            starts.append(8 * len(words))
            words += [address, address, 0, *sizes, *strides]
        self._words = (ctypes.c_int64 * len(words))(*words)
        base = ctypes.addressof(self._words)
        self.pointers = (ctypes.c_int64 * len(starts))(*(base + start for start in starts))
