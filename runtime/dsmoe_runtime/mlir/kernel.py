"""A compiled kernel: from memory, from disk, or made now, and never one that this processor cannot run."""

from __future__ import annotations

import ctypes
import functools

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir import cache
from dsmoe_runtime.mlir.compile import compile_object, compiler_version
from dsmoe_runtime.mlir.descriptors import Arguments
from dsmoe_runtime.mlir.levels import Level, cpu_flags
from dsmoe_runtime.mlir.loader import LoadedObject


class Kernel:
    """A function in a loaded object, which it keeps in memory."""

    def __init__(self, image: bytes, name: str) -> None:
        self._object = LoadedObject(image)
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(self._object.address(name))

    def __call__(self, arguments: Arguments, threads: int) -> None:
        self._call(ctypes.addressof(arguments.pointers), threads)


def kernel_object(source: str, level: Level, name: str) -> bytes:
    """The object file for any level, whatever this processor is."""
    key = "\n".join((compiler_version(), level.cpu, level.features, source))
    return cache.cached(key, lambda: compile_object(source, level, name))


@functools.cache
def kernel(source: str, level: Level, name: str) -> Kernel:
    """The entry point `name` of a module, ready to be called."""
    missing = level.flags - cpu_flags()
    if missing:
        raise TargetError(f"level {level.name} needs {', '.join(sorted(missing))}, which this processor lacks")
    return Kernel(kernel_object(source, level, name), name)
