"""A compiled function: from memory, from disk, or made now, and never one that this processor cannot run."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

from torch import Tensor

from dsmoe_runtime.mlir import cache
from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.compile import compile_object, compiler_version
from dsmoe_runtime.mlir.descriptors import Arguments, of_tensor
from dsmoe_runtime.mlir.function import Function, module
from dsmoe_runtime.mlir.levels import Level, check_runs
from dsmoe_runtime.mlir.loader import LoadedObject
from dsmoe_runtime.mlir.team import descriptor

ENTRY = "entry"


def callable_module(function: Function) -> str:
    """A module of one function and `@entry(data)`, which calls it; data: pointers to descriptors of its arguments."""
    code = Code()
    with code.region(f"llvm.func @{ENTRY}(%data: !llvm.ptr)"):
        values = []
        for position, kind in enumerate(function.arguments):
            struct = descriptor(kind)
            slot = code.let(f"llvm.getelementptr %data[{position}] : (!llvm.ptr) -> !llvm.ptr, !llvm.ptr")
            pointer = code.let(f"llvm.load {slot} : !llvm.ptr -> !llvm.ptr")
            loaded = code.let(f"llvm.load {pointer} : !llvm.ptr -> {struct}")
            values.append(code.let(f"builtin.unrealized_conversion_cast {loaded} : {struct} to {kind}"))
        code.line(function.call(values))
        code.line("llvm.return")
    return module([function], code.text())


class Kernel:
    """A function in a loaded object, which it keeps in memory."""

    def __init__(self, image: bytes, name: str) -> None:
        self._object = LoadedObject(image)
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._object.address(name))

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        arguments = Arguments([of_tensor(tensor) for tensor in tensors])
        self._call(ctypes.addressof(arguments.pointers))


def function_object(function: Function, level: Level) -> bytes:
    """The object file for any level, whatever this processor is."""
    source = callable_module(function)
    key = "\n".join((compiler_version(), level.cpu, level.features, source))
    return cache.cached(key, lambda: compile_object(source, level, ENTRY))


@functools.cache
def kernel(function: Function, level: Level) -> Kernel:
    """The function, ready to be called."""
    check_runs(level)
    return Kernel(function_object(function, level), ENTRY)
