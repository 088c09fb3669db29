"""The text of a program: a list of steps, each a call that hands over addresses; equal steps share their code.

    llvm.func @decode(%data, %sizes) {
      llvm.call @step_0(%ids, %embedding, %place0, %sizes)
      llvm.call @step_1(%place0, %q_proj, %place1, %sizes)          layer 0
      llvm.call @step_1(%place7, %q_proj_1, %place1, %sizes)        layer 1
    }
    llvm.func internal @step_1(%p0, %p1, %p2, %sizes) {             addresses become memrefs
      func.call @linear_..(...)
    }

What LLVM gets of another layer is a few loads and calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsmoe_compiler.targets.mlir.arena import LINE, Arena
from dsmoe_compiler.targets.mlir.layout import Buffer, View
from dsmoe_compiler.targets.mlir.sizes import Size, SizeCode
from dsmoe_runtime.mlir.code import Code

BASE = "memref<?xi8>"
STRUCT = "!llvm.struct<(ptr, ptr, i64, array<1 x i64>, array<1 x i64>)>"
# An address as memory without a known end.
BYTES = f"""\
  func.func private @bytes(%address: !llvm.ptr) -> {BASE} {{
    %none = llvm.mlir.undef : {STRUCT}
    %zero = llvm.mlir.constant(0 : i64) : i64
    %one = llvm.mlir.constant(1 : i64) : i64
    %many = llvm.mlir.constant(4611686018427387904 : i64) : i64
    %a = llvm.insertvalue %address, %none[0] : {STRUCT}
    %b = llvm.insertvalue %address, %a[1] : {STRUCT}
    %c = llvm.insertvalue %zero, %b[2] : {STRUCT}
    %d = llvm.insertvalue %many, %c[3, 0] : {STRUCT}
    %e = llvm.insertvalue %one, %d[4, 0] : {STRUCT}
    %whole = builtin.unrealized_conversion_cast %e : {STRUCT} to {BASE}
    return %whole : {BASE}
  }}"""
# What a function is handed: a view as a memref of the given type, a buffer as a whole, or a size.
Operand = tuple[View, str] | Buffer | Size


class Calls:
    """Collects the steps; `text` then writes the program."""

    def __init__(self, name: str, free: Sequence[str], number: dict[Buffer, int], arena: Arena) -> None:
        self.name, self.free, self.number, self.arena = name, free, number, arena
        self.steps: dict[str, str] = {}  # body -> name
        self.made: list[tuple[str, list[int | Place]]] = []  # a step, and its addresses: arguments, or places

    def add(self, operands: Sequence[Operand], call: Callable[[list[str]], str]) -> None:
        """A step; `call` writes the operation, given the names of its operands."""
        step = _Step(self.free)
        values = [step.operand(operand) for operand in operands]
        step.code.line(call(values))
        body = step.code.text()
        count = len(step.buffers)
        name = self.steps.setdefault(f"{count}\n{body}", f"step_{len(self.steps)}")
        places: list[int | Place] = [
            self.number[b] if b in self.number else Place(self.arena.place[b]) for b in step.buffers
        ]
        self.made.append((name, places))

    def text(self) -> str:
        """Every function of the program."""
        code = Code()
        for key, name in self.steps.items():
            count, _, body = key.partition("\n")
            parameters = "".join(f"%p{n}: !llvm.ptr, " for n in range(int(count)))
            with code.region(f"llvm.func internal @{name}({parameters}%sizes: !llvm.ptr) attributes {{no_inline}}"):
                code.lines.append(body)
                code.line("llvm.return")
        with code.region(f"llvm.func @{self.name}(%data: !llvm.ptr, %sizes: !llvm.ptr)"):
            self.body(code)
            code.line("llvm.return")
        with code.region(f"llvm.func @{self.name}_workspace(%sizes: !llvm.ptr) -> i64"):
            end = self.offsets(code)[-1]
            code.line(f"llvm.return {code.let(f'arith.index_cast {end} : index to i64')} : i64")
        return f"{BYTES}\n{code.text()}"

    def body(self, code: Code) -> None:
        def argument(number: int) -> str:
            place = code.let(f"llvm.getelementptr %data[{number}] : (!llvm.ptr) -> !llvm.ptr, !llvm.ptr")
            return code.let(f"llvm.load {place} : !llvm.ptr -> !llvm.ptr", "p")

        workspace = argument(len(self.number))
        places = []
        for start in self.offsets(code)[:-1]:
            offset = code.let(f"arith.index_cast {start} : index to i64")
            places.append(
                code.let(f"llvm.getelementptr {workspace}[{offset}] : (!llvm.ptr, i64) -> !llvm.ptr, i8", "p")
            )
        arguments: dict[int, str] = {}
        for name, wanted in self.made:
            for place in wanted:
                if not isinstance(place, Place) and place not in arguments:
                    arguments[place] = argument(place)
            values = [places[p.number] if isinstance(p, Place) else arguments[p] for p in wanted]
            kinds = ", ".join(["!llvm.ptr"] * (len(values) + 1))
            code.line(f"llvm.call @{name}({', '.join([*values, '%sizes'])}) : ({kinds}) -> ()")

    def offsets(self, code: Code) -> list[str]:
        """Where each place of the workspace begins, and the end."""
        size = SizeCode(code, free_sizes(code, self.free))
        starts = [size(0)]
        for bytes_ in self.arena.sizes:
            lines = code.div(code.add(size(bytes_), LINE - 1), LINE)
            starts.append(code.add(starts[-1], code.mul(lines, LINE)))
        return starts


class Place:
    """One of the workspace."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Step:
    """The body of one step."""

    def __init__(self, free: Sequence[str]) -> None:
        self.code = Code()
        self.size = SizeCode(self.code, free_sizes(self.code, free))
        self.buffers: dict[Buffer, str] = {}

    def operand(self, operand: Operand) -> str:
        if isinstance(operand, Buffer):
            sizes = ", ".join(self.size(size) for size in operand.sizes if not isinstance(size, int))
            return self.code.let(f"memref.view {self.bytes(operand)}[{sizes}] : {BASE} to {kind_of(operand)}")
        if isinstance(operand, tuple):
            return self.strided(*operand)
        return self.code.let(f"arith.index_cast {self.size(operand)} : index to i64")

    def bytes(self, buffer: Buffer) -> str:
        """The memory of a buffer, and where in it it begins."""
        if buffer not in self.buffers:
            address = f"%p{len(self.buffers)}"
            self.buffers[buffer] = self.code.let(f"func.call @bytes({address}) : (!llvm.ptr) -> {BASE}", "m")
        return f"{self.buffers[buffer]}[{self.size(0)}]"

    def strided(self, view: View, kind: str) -> str:
        flat = f"memref<?x{view.element}>"
        memory = self.bytes(view.buffer)
        values = self.code.let(f"memref.view {memory}[{self.size(view.buffer.count)}] : {BASE} to {flat}")
        sizes = ", ".join(self.size(size) for size in view.sizes)
        strides = [self.size(stride) for stride in view.strides]
        if "1]" in kind:
            strides[-1] = "1"
        return self.code.let(
            f"memref.reinterpret_cast {values} to offset: [{self.size(view.offset)}], sizes: [{sizes}], "
            f"strides: [{', '.join(strides)}] : {flat} to {kind}"
        )


def free_sizes(code: Code, free: Sequence[str]) -> dict[str, str]:
    """The free dimensions, read from %sizes."""
    names = {}
    for number, symbol in enumerate(free):
        place = code.let(f"llvm.getelementptr %sizes[{number}] : (!llvm.ptr) -> !llvm.ptr, i64")
        value = code.let(f"llvm.load {place} : !llvm.ptr -> i64")
        names[symbol] = code.let(f"arith.index_cast {value} : i64 to index", "s")
    return names


def kind_of(buffer: Buffer) -> str:
    """The memref type of a whole buffer, free dimensions as `?`."""
    sizes = "".join(f"{size if isinstance(size, int) else '?'}x" for size in buffer.sizes)
    return f"memref<{sizes}{buffer.element}>"
