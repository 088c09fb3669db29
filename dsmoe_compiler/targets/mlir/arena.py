"""One block of memory for all that a program computes on the way: values that never live together share a place.

Sizes are expressions, so a place is reused for a value of the very same size; equal layers have those.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy

from dsmoe_compiler.targets.mlir.layout import Buffer
from dsmoe_compiler.targets.mlir.sizes import Size

BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i16": 2, "i8": 1, "i1": 1}
LINE = 64  # bytes of a cache line


@dataclass
class Arena:
    """Which place each buffer has; `sizes` are those of the places, in bytes."""

    sizes: list[Size] = field(default_factory=list)
    place: dict[Buffer, int] = field(default_factory=dict)
    free: dict[Any, list[int]] = field(default_factory=dict)

    def take(self, buffer: Buffer) -> None:
        size = buffer.count * BYTES[buffer.element]
        waiting = self.free.setdefault(sympy.sympify(size), [])
        if waiting:
            self.place[buffer] = waiting.pop()
            return
        self.place[buffer] = len(self.sizes)
        self.sizes.append(size)

    def give_back(self, buffers: Iterable[Buffer]) -> None:
        for buffer in buffers:
            place = self.place[buffer]
            self.free[sympy.sympify(self.sizes[place])].append(place)
