"""Writes MLIR as text: one line an operation, names made on the way, regions as `with` blocks.

    code = Code()
    with code.function("double_all", "%x: memref<?xf32>"):
        with code.loop(0, code.let("memref.dim %x, %c0 : memref<?xf32>"), 1) as loop:
            value = code.let(f"memref.load %x[{loop.index}] : memref<?xf32>")
            ...

Values are SSA names such as "%v3"; where an index is wanted, a Python int will do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

Value = str | int


@dataclass
class Loop:
    """A loop being written: its index, what it carries, and after the block its results."""

    index: str
    carried: list[str]
    results: list[str]
    given: list[str] = field(default_factory=list)

    def give(self, values: Sequence[str]) -> None:
        """What the next turn carries."""
        self.given = list(values)


class Code:
    """MLIR text under construction; private functions are called `prefix`_name once the text is taken.

    `dot`: bfloat16 is multiplied in pairs (vdpbf16ps), where a tile can have it so.
    """

    def __init__(self, prefix: str = "", *, dot: bool = False) -> None:
        self.dot = dot
        self.lines: list[str] = []
        self.functions: set[str] = set()
        self._prefix = prefix
        self._depth = 1
        self._names = 0

    def line(self, text: str) -> None:
        """An operation without a result."""
        self.lines.append("  " * self._depth + text)

    def name(self, hint: str = "v") -> str:
        """A name not used before."""
        self._names += 1
        return f"%{hint}{self._names}"

    def let(self, operation: str, hint: str = "v") -> str:
        """An operation with one result -> the name of the result."""
        result = self.name(hint)
        self.line(f"{result} = {operation}")
        return result

    def index(self, value: Value) -> str:
        """An index: a name as it is, an int as a constant."""
        return value if isinstance(value, str) else self.let(f"arith.constant {value} : index", "c")

    def constant(self, value: float, kind: str) -> str:
        """A float32 (or a vector of them, all `value`) in LLVM's exact spelling."""
        literal = f"{value:.17e}" if math.isfinite(value) else {math.inf: "0x7F800000", -math.inf: "0xFF800000"}[value]
        return self.let(f"arith.constant {literal if 'vector' not in kind else f'dense<{literal}>'} : {kind}", "k")

    def _binary(self, operation: str, a: Value, b: Value) -> str:
        return self.let(f"arith.{operation} {self.index(a)}, {self.index(b)} : index", "i")

    def add(self, a: Value, b: Value) -> str:
        return self._binary("addi", a, b)

    def sub(self, a: Value, b: Value) -> str:
        return self._binary("subi", a, b)

    def mul(self, a: Value, b: Value) -> str:
        return self._binary("muli", a, b)

    def div(self, a: Value, b: Value) -> str:
        return self._binary("divui", a, b)

    def rem(self, a: Value, b: Value) -> str:
        return self._binary("remui", a, b)

    def div_up(self, a: Value, b: Value) -> str:
        return self._binary("ceildivui", a, b)

    def most(self, a: Value, b: Value) -> str:
        return self._binary("maxsi", a, b)

    def least(self, a: Value, b: Value) -> str:
        return self._binary("minsi", a, b)

    def compare(self, predicate: str, a: Value, b: Value) -> str:
        return self.let(f"arith.cmpi {predicate}, {self.index(a)}, {self.index(b)} : index", "b")

    def select(self, condition: str, a: Value, b: Value) -> str:
        """One of two indices."""
        return self.let(f"arith.select {condition}, {self.index(a)}, {self.index(b)} : index", "i")

    def up_to_multiple(self, a: Value, of: Value) -> str:
        """The next multiple of `of` from `a` on."""
        return self.mul(self.div_up(a, of), of)

    def dim(self, memref: str, axis: int, kind: str) -> str:
        """A size of a memref."""
        return self.let(f"memref.dim {memref}, {self.index(axis)} : {kind}", "d")

    def load(self, memref: str, at: str, kind: str) -> str:
        """One element."""
        return self.let(f"memref.load {memref}[{at}] : {kind}")

    def down_to_multiple(self, a: Value, of: int) -> str:
        """`a` without its remainder by `of`."""
        return self.mul(self.div(a, of), of)

    @contextmanager
    def region(self, head: str, tail: str | None = "}") -> Iterator[None]:
        """`head {` ... `}`; without a tail the next region closes this one."""
        self.line(head + " {")
        self._depth += 1
        yield
        self._depth -= 1
        if tail is not None:
            self.line(tail)

    @contextmanager
    def function(self, name: str, arguments: str, results: str = "") -> Iterator[None]:
        """A private function; the block writes its body, and its return if it has results."""
        arrow = f" -> {results}" if results else ""
        self.functions.add(name)
        with self.region(f"func.func private @{name}({arguments}){arrow}"):
            yield
            if not results:
                self.line("return")

    @contextmanager
    def public(self, name: str, arguments: str) -> Iterator[None]:
        """A function that others call, under this very name."""
        with self.region(f"func.func @{name}({arguments})"):
            yield
            self.line("return")

    @contextmanager
    def loop(
        self, start: Value, stop: Value, step: Value, carried: Sequence[str] = (), kind: str = "vector<8xf32>"
    ) -> Iterator[Loop]:
        """`scf.for`; values that are carried are all of one `kind`, and `give` says the next ones."""
        bounds = [self.index(value) for value in (start, stop, step)]
        index, names = self.name("i"), [self.name("a") for _ in carried]
        result = self.name("r")
        results = [result] if len(names) == 1 else [f"{result}#{n}" for n in range(len(names))]
        head = f"scf.for {index} = {bounds[0]} to {bounds[1]} step {bounds[2]}"
        if names:
            pairs = ", ".join(f"{a} = {b}" for a, b in zip(names, carried, strict=True))
            many = "" if len(names) == 1 else f":{len(names)}"
            head = f"{result}{many} = {head} iter_args({pairs}) -> ({', '.join([kind] * len(names))})"
        loop = Loop(index, names, results)
        with self.region(head):
            yield loop
            if names:
                assert len(loop.given) == len(names), "a loop that carries values must give as many"
                self.line(f"scf.yield {', '.join(loop.given)} : {', '.join([kind] * len(names))}")

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """`scf.if` without results."""
        with self.region(f"scf.if {condition}"):
            yield

    def text(self) -> str:
        """What was written so far."""

        def renamed(found: re.Match[str]) -> str:
            return f"@{self._prefix}_{found[1]}" if self._prefix and found[1] in self.functions else found[0]

        return re.sub(r"@(\w+)", renamed, "\n".join(self.lines))
