"""An operator as a function in MLIR: self-contained text that can be pasted into any module, and called from it.

    module {
      EXTERNAL                                    declared once, whatever is pasted
      func.func private @linear_2f_..(...)        helpers, named after the function that they belong to
      func.func @linear_2f(%x, %w, %y) { ... }    takes its workspace, shares its work among OpenMP's threads
      func.func @graph(...) { ... func.call @linear_2f(...) ... }
    }

Every memref is fully dynamic: sizes and strides are read when it is called, so that all layers of a model share one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Of torch's own libgomp. Whoever pastes functions declares them once.
EXTERNAL = """\
  llvm.func @GOMP_parallel(!llvm.ptr, !llvm.ptr, i32, i32)
  llvm.func @GOMP_barrier()
  llvm.func @omp_get_max_threads() -> i32
  llvm.func @omp_get_num_threads() -> i32"""


@dataclass(frozen=True)
class Function:
    """`source` defines `@name`, a public func.func that takes `arguments`, outputs last, and returns nothing."""

    name: str
    source: str
    arguments: tuple[str, ...]

    def call(self, values: Sequence[str]) -> str:
        """The operation that calls it."""
        return f"func.call @{self.name}({', '.join(values)}) : ({', '.join(self.arguments)}) -> ()"


def matrix(element: str, rank: int = 2) -> str:
    """The memref type of an argument: any sizes, any strides but the last, which is 1."""
    sizes, strides = "x".join("?" * rank), ", ".join([*"?" * (rank - 1), "1"])
    return f"memref<{sizes}x{element}, strided<[{strides}], offset: ?>>"


def symbol(kind: str, spec: Any) -> str:
    """A name that no other spec of any kind has."""
    return f"{kind}_{hashlib.sha256(repr(spec).encode()).hexdigest()[:10]}"


def module(functions: Iterable[Function], rest: str = "") -> str:
    """A module of functions, each once, and whatever calls them."""
    sources = {function.name: function.source for function in functions}
    return "module {\n" + "\n".join((EXTERNAL, *sources.values(), rest)) + "\n}\n"
