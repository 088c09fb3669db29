"""What must be known to call a program: its arguments in order, its free dimensions, its results. Plain data, as JSON.

    void prefill(void **data, int64_t *sizes)        data: an address for each argument, then one of the workspace
    int64_t prefill_workspace(int64_t *sizes)        bytes of it; sizes: the free dimensions in order

Shapes hold numbers and formulas of free dimensions, such as "256*s27". Each argument is dense, its last dimension
innermost.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dsmoe_runtime.errors import ArtifactError

Number = int | str
_ALLOWED = (
    ast.Expression, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow, ast.Name, ast.Load,
    ast.Constant, ast.UnaryOp, ast.USub,
)  # fmt: skip


@dataclass(frozen=True)
class Argument:
    """`kind`: "input", "weight" or "output"; `name`: of the graph's input, of the weight, or of a result."""

    kind: str
    name: str
    dtype: str
    shape: tuple[Number, ...]


@dataclass(frozen=True)
class Result:
    """A view of the argument with that number."""

    argument: int
    dtype: str
    offset: Number
    shape: tuple[Number, ...]
    strides: tuple[Number, ...]


@dataclass(frozen=True)
class Free:
    """A free dimension is dimension `dim` of input number `input`, or that input itself where `dim` is None."""

    name: str
    input: int
    dim: int | None


@dataclass(frozen=True)
class Interface:
    """Of one program; `inputs` are the names of the graph's inputs, tensors or not."""

    entry: str
    inputs: tuple[str, ...]
    free: tuple[Free, ...]
    arguments: tuple[Argument, ...]
    results: tuple[Result | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Interface:
        """The inverse of `to_dict`. Raises: ArtifactError, if that is no interface."""
        try:
            return cls(
                str(values["entry"]),
                tuple(map(str, values["inputs"])),
                tuple(Free(**free) for free in values["free"]),
                tuple(Argument(**a | {"shape": tuple(a["shape"])}) for a in values["arguments"]),
                tuple(
                    None if r is None else Result(**r | {n: tuple(r[n]) for n in ("shape", "strides")})
                    for r in values["results"]
                ),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"a program's interface is damaged: {error}") from None


def formula(text: Number) -> Callable[[dict[str, int]], int]:
    """A function of the free dimensions. Raises: ArtifactError, for anything but sums and products of them."""
    if isinstance(text, int):
        return lambda _free: text
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        raise ArtifactError(f"{text[:99]!r} is no size") from None
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED) or (isinstance(node, ast.Constant) and type(node.value) is not int):
            raise ArtifactError(f"{text[:99]!r} is no size: it holds {type(node).__name__}")
    code = compile(tree, "<size>", "eval")
    return lambda free: int(eval(code, {"__builtins__": {}}, free))  # of numbers and names alone


def formulas(numbers: tuple[Number, ...]) -> Callable[[dict[str, int]], list[int]]:
    """`formula` of each."""
    if all(isinstance(number, int) for number in numbers):
        fixed = [number for number in numbers if isinstance(number, int)]
        return lambda _free: fixed
    each = [formula(number) for number in numbers]
    return lambda free: [one(free) for one in each]
