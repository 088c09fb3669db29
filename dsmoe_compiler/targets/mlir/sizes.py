"""Sizes that are known when a program is called: expressions of the graph's free dimensions.

    256 * s27        ->   %c256 = arith.constant 256 : index
                          %i1 = arith.muli %c256, %s27 : index

They are computed as numbers by who calls, and as MLIR by what is called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.code import Code

Size = Any  # int, or a sympy expression, for which there are no types


def size_of(value: int | torch.SymInt) -> Size:
    """A dimension of a fake tensor: a number, or an expression of symbols."""
    if isinstance(value, int):
        return value
    expression = value.node._expr
    if not expression.is_Symbol or value.node.shape_env.replacements:  # simplified where something is known of it
        expression = value.node.expr
    return int(expression) if expression.is_Integer else expression


def product(sizes: Iterable[Size]) -> Size:
    """Of all of them."""
    result: Any = 1
    for size in sizes:
        result = result * size
    if isinstance(result, int):
        return result
    return int(result) if result.is_Integer else sympy.expand(result)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal whatever their symbols are."""
    if (isinstance(a, int) and isinstance(b, int)) or a == b:
        return bool(a == b)
    return bool(sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0)


class SizeCode:
    """Writes expressions as index arithmetic, each once."""

    def __init__(self, code: Code, free: dict[str, str]) -> None:
        self.code, self.free = code, free  # symbol -> SSA name
        self.known: dict[Any, str] = {}

    def __call__(self, size: Size) -> str:
        """The SSA name of the value."""
        key = sympy.sympify(size)
        if key not in self.known:
            self.known[key] = self.write(key)
        return self.known[key]

    def write(self, size: sympy.Expr) -> str:
        if size.is_Integer:
            return self.code.index(int(size))
        if size.is_Symbol:
            if str(size) not in self.free:
                raise TargetError(f"the size {size} depends on data, not on the inputs' shapes: mlir-cpu has no such")
            return self.free[str(size)]
        operation = {sympy.Add: self.code.add, sympy.Mul: self.code.mul}.get(type(size))
        if operation is None and type(size).__name__ in ("FloorDiv", "CleanDiv", "PythonMod", "Mod"):
            operation = self.code.rem if "Mod" in type(size).__name__ else self.code.div
        if operation is None and type(size).__name__ in ("Min", "Max"):  # strides of what may hold one row
            operation = self.code.least if type(size).__name__ == "Min" else self.code.most
        if operation is None and size.is_Pow and size.exp.is_Integer and size.exp > 0:
            operation, arguments = self.code.mul, [size.base] * int(size.exp)
        else:
            arguments = list(size.args)
        if operation is None:
            raise TargetError(f"the size {size} holds {type(size).__name__}, which mlir-cpu does not compute")
        value = self(arguments[0])
        for argument in arguments[1:]:
            value = operation(value, self(argument))
        return value
