"""Where each value of a graph lies: a dense buffer, or a view of one by offset, sizes and strides.

    linear     [1, S, 256]                  a buffer of its own
    unflatten  [1, S, 4, 64]                the same buffer, other sizes
    transpose  [1, 4, S, 64]                the same buffer, strides (256 * S, 64, 256, 1)

Views are never copied: whoever reads one is handed sizes and strides.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dsmoe_compiler.targets.mlir.sizes import Size, product, same, size_of
from dsmoe_runtime.errors import TargetError

ELEMENTS = {
    torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "i8", torch.bool: "i1",
}  # fmt: skip
IN_PLACE = (torch.ops.aten.index_copy_.default, torch.ops.aten.copy_.default)
# Views by their schema that may copy; their fake values tell.
MAYBE = ("reshape", "flatten", "contiguous", "to", "_reshape_alias", "unflatten")


@dataclass(frozen=True)
class Buffer:
    """Dense memory of one node's value: `sizes` are in the order in which they lie, the last one innermost.

    `order` takes the dimensions of the value to the order of memory; None for one that is not dense (an input only).
    """

    name: str
    element: str
    sizes: tuple[Size, ...]
    order: tuple[int, ...]

    @property
    def count(self) -> Size:
        return product(self.sizes)


@dataclass(frozen=True)
class View:
    """Part of a buffer."""

    buffer: Buffer
    offset: Size
    sizes: tuple[Size, ...]
    strides: tuple[Size, ...]

    @property
    def element(self) -> str:
        return self.buffer.element

    def flat_rows(self) -> View | None:
        """All dimensions but the last as one, or None where that would take a copy."""
        sizes, strides = list(self.sizes), list(self.strides)
        rows, step = 1, None
        for size, stride in zip(reversed(sizes[:-1]), reversed(strides[:-1]), strict=True):
            if isinstance(size, int) and size == 1:
                continue
            if step is None:
                step, rows = stride, size
            elif same(stride, step * rows):
                rows = rows * size
            else:
                return None
        if step is None:
            step = sizes[-1]
        return View(self.buffer, self.offset, (product([rows]), sizes[-1]), (step, strides[-1]))

    def leading_ones(self, rank: int) -> View:
        """The same with dimensions of size 1 before the others, up to `rank`."""
        more = rank - len(self.sizes)
        return View(self.buffer, self.offset, (1,) * more + self.sizes, (0,) * more + self.strides)

    @property
    def inner_is_one(self) -> bool:
        """Whether values of a row lie side by side."""
        return not self.sizes or self.sizes[-1] == 1 or (isinstance(self.strides[-1], int) and self.strides[-1] == 1)


def memory_order(sizes: tuple[Size, ...], strides: tuple[Size, ...]) -> tuple[int, ...] | None:
    """The dimensions from outermost to innermost, if the value is dense."""

    def fits(order: tuple[int, ...]) -> bool:
        expected: Any = 1
        for dim in reversed(order):
            if sizes[dim] == 1:
                continue
            if not same(strides[dim], expected):
                return False
            expected = expected * sizes[dim]
        return True

    plain = tuple(range(len(sizes)))
    if 0 in sizes or fits(plain):
        return plain
    left, expected = list(plain), 1
    order: list[int] = []
    while left:  # from the inside out
        found = next((dim for dim in reversed(left) if sizes[dim] == 1), None)
        if found is None:
            found = next((dim for dim in reversed(left) if same(strides[dim], expected)), None)
        if found is None:
            return None
        order.insert(0, found)
        left.remove(found)
        expected = expected * sizes[found]
    return tuple(order) if fits(tuple(order)) else None


def tensor_of(node: fx.Node) -> Tensor | None:
    """The fake value of a node that is one tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a free dimension; sizes are computed by whoever wants them."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat | int | bool | float)


def viewed(node: fx.Node) -> fx.Node | None:
    """The node whose memory this one's value lies in, if it is a view."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, fx.Node) and is_view_list(source) else None
    if node.target in IN_PLACE:
        return node.args[0]  # type: ignore[return-value]
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    returns = node.target._schema.returns
    if len(returns) != 1 or returns[0].alias_info is None or returns[0].alias_info.is_write:
        return None
    if is_view_list(node):
        return node.args[0]
    ours, theirs = tensor_of(node), tensor_of(node.args[0])
    if ours is None or (theirs is None and not is_view_list(node.args[0])):
        return None
    if node.target._schema.name.partition("::")[2] in MAYBE and theirs is not None:
        return node.args[0] if same_storage(ours, theirs) else None
    return node.args[0]


def same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two fake tensors share memory."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def is_view_list(node: fx.Node) -> bool:
    """Whether a node is a list of views, as `split` gives."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return re.search(r"-> Tensor\(a[^)]*\)\[\]$", str(node.target._schema)) is not None


def root_of(node: fx.Node) -> fx.Node:
    """The node that made the memory in which this one's value lies."""
    source = viewed(node)
    while source is not None:
        node, source = source, viewed(source)
    return node


def shape_of(value: Tensor) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    """Sizes and strides of a fake tensor."""
    return tuple(size_of(s) for s in value.shape), tuple(size_of(s) for s in value.stride())


def buffer_of(value: Tensor, name: str) -> Buffer:
    """The memory that a value of this fake tensor's layout takes. Raises: TargetError, if it is not dense."""
    sizes, strides = shape_of(value)
    order = memory_order(sizes, strides)
    if value.dtype not in ELEMENTS:
        raise TargetError(f"{name} is {value.dtype}; mlir-cpu takes {', '.join(str(d)[6:] for d in ELEMENTS)}")
    if order is None:
        raise TargetError(f"{name} {sizes} lies by strides {strides}, with gaps: mlir-cpu takes dense tensors")
    return Buffer(name, ELEMENTS[value.dtype], tuple(sizes[dim] for dim in order), order)


def view_of(value: Tensor, buffer: Buffer, root: Tensor) -> View:
    """A fake tensor that is `root`, which lies in `buffer`, or a view of it."""
    sizes, strides = shape_of(value)
    offset = size_of(value.storage_offset()) - size_of(root.storage_offset())
    return View(buffer, int(offset) if getattr(offset, "is_Integer", True) else offset, sizes, strides)
