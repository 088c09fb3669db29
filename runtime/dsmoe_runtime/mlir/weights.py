"""Blocks of an expert's weight rows as the tiles want them: seen in place where they can be, unpacked where not.

    float32 [E, N, K]                seen in place, or copied as below for more than 64 tokens, which pay for it
    bfloat16, float16 [E, N, K]      unpacked to float32, [rows, 192] at a time, into the thread's own scratch memory
    [E, K, N] (transposed layouts)   the same, the other way round

A block that was unpacked serves all tokens of the expert, so that with many of them it costs next to nothing. Row tiles
take half precision in place and widen it in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_runtime.mlir.code import Code, Value
from dsmoe_runtime.mlir.formats import widen, widen_scalar
from dsmoe_runtime.mlir.row_tiles import MATRIX, WIDE

AHEAD = 8  # rows: so far ahead of the unpacking memory is asked


@dataclass(frozen=True)
class Stack:
    """The weights of all experts, %w of a function: [E, N, K] by its strides, whatever lies innermost."""

    element: str
    transposed: bool  # N lies innermost, not K

    @property
    def kind(self) -> str:
        inner = "?" if self.transposed else "1"
        return f"memref<?x?x?x{self.element}, strided<[?, ?, {inner}], offset: ?>>"

    @property
    def unpack(self) -> str:
        """The function that unpacks its rows."""
        return f"unpack_{self.element}" + ("_transposed" if self.transposed else "")

    @property
    def rows_kind(self) -> str:
        """Some rows of one expert."""
        if self.transposed:
            return f"memref<?x?x{self.element}, strided<[?, ?], offset: ?>>"
        return MATRIX.format(self.element)

    @property
    def in_place(self) -> bool:
        """Whether lane tiles can read it as it is."""
        return self.element == "f32" and not self.transposed

    def rows(self, code: Code, expert: str, first: str, count: str, step: int, k: Value, size: str) -> str:
        """`size` values from k on of the rows first, first + step, ... of one expert."""
        at, steps = f"[{expert}, {first}, {code.index(k)}]", f"[1, {step}, 1]"
        return code.let(f"memref.subview %w{at} [1, {count}, {size}] {steps} : {self.kind} to {self.rows_kind}", "rows")


def scratch_matrix(code: Code, scratch: str, offset: Value, rows: Value, columns: Value) -> str:
    """A float32 matrix in a thread's scratch memory, which begins at %mine."""
    at, height, width = code.add("%mine", offset), code.index(rows), code.index(columns)
    return code.let(
        f"memref.reinterpret_cast {scratch} to offset: [{at}], sizes: [{height}, {width}], strides: [{width}, 1] : "
        f"memref<?xf32> to {WIDE}"
    )


def unpack(code: Code, stack: Stack, lanes: int) -> None:
    """Write `@unpack_..(w, rows, size, out)`: out[n, k] = float32 of w[n, k]."""
    source = stack.rows_kind
    if stack.unpack in code.functions:
        return
    with code.function(stack.unpack, f"%w: {source}, %rows: index, %size: index, %out: {WIDE}"):
        whole = 0 if stack.transposed else code.down_to_multiple("%size", lanes)
        with code.loop(0, "%rows", 1) as n:
            if not stack.transposed:
                ahead = code.add(n.index, AHEAD)
                with code.loop(0, whole, 4 * lanes) as line:
                    code.line(f"memref.prefetch %w[{ahead}, {line.index}], read, locality<3>, data : {source}")
                    with code.loop(line.index, code.least(code.add(line.index, 4 * lanes), whole), lanes) as k:
                        at = f"[{n.index}, {k.index}]"
                        raw = code.let(f"vector.load %w{at} : {source}, vector<{lanes}x{stack.element}>")
                        value = widen(code, raw, stack.element, lanes)
                        code.line(f"vector.store {value}, %out{at} : {WIDE}, vector<{lanes}xf32>")
            with code.loop(whole, "%size", 1) as k:
                at = f"[{n.index}, {k.index}]"
                value = widen_scalar(code, code.let(f"memref.load %w{at} : {source}"), stack.element)
                code.line(f"memref.store {value}, %out{at} : {WIDE}")
