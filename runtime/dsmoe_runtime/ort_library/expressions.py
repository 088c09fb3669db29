"""Whole numbers that depend on the number of tokens T, as text that a few lines of C++ evaluate.

    6*T        ->  T,6,*                    operands before what joins them
    cdiv(T,64) ->  T,63,+,64,/              / rounds down
    min(T,8)   ->  T,8,min

`+ * / % min max` and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch

from dsmoe_runtime.errors import TargetError

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add, "*": operator.mul, "/": operator.floordiv, "%": operator.mod, "min": min, "max": max,
}  # fmt: skip
# torch's names for what sympy has no function for, or one that does not stay an integer; from release to release more
NAMES = {
    "Add": "+", "Mul": "*", "FloorDiv": "/", "CleanDiv": "/", "Mod": "%", "PythonMod": "%", "Min": "min", "Max": "max",
}  # fmt: skip


def text(value: int | torch.SymInt) -> str:
    """Of a number, or of one that torch knows as an expression in a single symbol. Raises: TargetError."""
    if isinstance(value, int):
        return str(value)
    return ",".join(words(value.node.expr))


def words(expression: Any) -> list[str]:
    """A sympy expression's operands and operations, in the order of evaluation. Raises: TargetError."""
    if expression.is_Integer:
        return [str(int(expression))]
    if expression.is_Symbol:
        return ["T"]
    name = NAMES.get(type(expression).__name__)
    if name is None:
        raise TargetError(
            f"a kernel's argument is {expression}, in which {type(expression).__name__} is nothing that the library "
            f"can evaluate ({', '.join(sorted(OPERATIONS))}); write the host part with those"
        )
    parts = [words(part) for part in expression.args]
    return reduce(lambda left, right: [*left, *right, name], parts[1:], parts[0])


def evaluate(written: str, tokens: int) -> int:
    """What the library makes of a text."""
    stack: list[int] = []
    for word in written.split(","):
        if word in OPERATIONS:
            right, left = stack.pop(), stack.pop()
            stack.append(OPERATIONS[word](left, right))
        else:
            stack.append(tokens if word == "T" else int(word))
    (value,) = stack
    return value
