"""A graph that has been divided and laid out: the text of its program, and what the program calls."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dsmoe_compiler.targets.mlir.glue import GlueGraph
from dsmoe_compiler.targets.mlir.interface import Argument, Free, Interface, Result
from dsmoe_compiler.targets.mlir.layout import ELEMENTS, Buffer, View
from dsmoe_compiler.targets.mlir.sizes import Size
from dsmoe_runtime.mlir.function import Function


@dataclass(frozen=True)
class Output:
    """A result: a view of an argument, by its number."""

    argument: int
    view: View
    dtype: torch.dtype

    def result(self) -> Result:
        """The same as plain data."""
        view, (offset,) = self.view, numbers((self.view.offset,))
        return Result(
            self.argument, str(self.dtype).removeprefix("torch."), offset, numbers(view.sizes), numbers(view.strides)
        )


@dataclass
class Schedule:
    """A graph ready to be compiled. `arguments`: inputs and weights in the graph's order, then memory for results."""

    name: str
    arguments: list[tuple[str, str, Buffer]]  # kind, name, what
    outputs: list[Output | None]
    sources: dict[str, tuple[int, int | None]]  # free dimension -> input, dimension (None: the input itself)
    inputs: list[str]  # the graph's placeholders
    text: str = ""
    functions: dict[str, Function] = field(default_factory=dict)
    glues: dict[str, GlueGraph] = field(default_factory=dict)  # by name
    layers: dict[str, set[str]] = field(default_factory=dict)  # layer -> names of what it calls
    seconds: float = 0.0

    def interface(self) -> Interface:
        """What must be known to call the program."""
        return Interface(
            self.name,
            tuple(self.inputs),
            tuple(Free(symbol, number, dim) for symbol, (number, dim) in self.sources.items()),
            tuple(
                Argument(kind, name, dtype_of(buffer.element), numbers(buffer.sizes))
                for kind, name, buffer in self.arguments
            ),
            tuple(None if one is None else one.result() for one in self.outputs),
        )

    @property
    def key(self) -> str:
        """All that the code of the program and its glue depends on, but for the compiler."""
        return "\n".join([self.text, *(f"{name}\n{glue.key}" for name, glue in self.glues.items())])


def numbers(sizes: tuple[Size, ...]) -> tuple[int | str, ...]:
    """Sizes as plain data."""
    return tuple(size if isinstance(size, int) else str(size) for size in sizes)


def dtype_of(element: str) -> str:
    """torch's name of an element's type."""
    return next(str(dtype).removeprefix("torch.") for dtype, name in ELEMENTS.items() if name == element)
