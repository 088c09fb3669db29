"""Which function computes a node, and with what: the waist between graphs and generated kernels.

aten.index_copy_, aten.copy_       write_slots, write_over     into the caller's memory
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from dsmoe_compiler.targets.mlir.layout import View, tensor_of
from dsmoe_compiler.targets.mlir.slots import write_over, write_slots
from dsmoe_runtime.mlir.function import Function
from dsmoe_runtime.mlir.levels import Level

aten = torch.ops.aten
Where = Callable[[fx.Node], View]


@dataclass(frozen=True)
class Operation:
    """A function and what it is called with, outputs last. `made` are the nodes whose values it writes anew."""

    function: Function
    operands: tuple[View, ...]
    made: tuple[fx.Node, ...] = ()


def operation(node: fx.Node, where: Where, level: Level) -> Operation | None:
    """What computes a node, if one function does."""
    make = MAKERS.get(node.target)
    return None if make is None else make(node, where, level)


def _write_slots(node: fx.Node, where: Where, _level: Level) -> Operation | None:
    target, dim, index, source = cast(tuple[fx.Node, int, fx.Node, fx.Node], node.args)
    views = [where(n) for n in (target, index, source)]
    rank = len(views[0].sizes)
    if rank < 2 or dim % rank == rank - 1 or not all(v.inner_is_one for v in views):
        return None
    return Operation(write_slots(views[0].element, rank, dim % rank), tuple(views))


def _write_over(node: fx.Node, where: Where, _level: Level) -> Operation | None:
    nodes = cast(tuple[fx.Node, fx.Node], node.args[:2])
    (target, source), (a, b) = (where(n) for n in nodes), (tensor_of(n) for n in nodes)
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype or not a.dim():
        return None
    if not (target.inner_is_one and source.inner_is_one):
        return None
    return Operation(write_over(target.element, len(target.sizes)), (target, source))


MAKERS: dict[Any, Callable[[fx.Node, Where, Level], Operation | None]] = {
    aten.index_copy_.default: _write_slots,
    aten.copy_.default: _write_over,
}
