"""What both ways of attending share: where queries, their masks and a thread's scratch memory lie.

Letters: B batch, Hq and Hkv heads of queries and of keys, S queries of a head, C slots of keys and values, D and Dv.
The queries of one head of keys are numbered qi = (head of the group) * S + s; they share keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dsmoe_runtime.mlir.code import Code, Value
from dsmoe_runtime.mlir.formats import widen_scalar
from dsmoe_runtime.mlir.function import matrix
from dsmoe_runtime.mlir.gather import FLAT
from dsmoe_runtime.mlir.levels import Level
from dsmoe_runtime.mlir.sort import INDEX
from dsmoe_runtime.mlir.weights import scratch_matrix

PANELS = 4  # of 2 L queries, that go through one block of slots before the next is read
SLOTS = 64  # of a block
HIDDEN = -1.0e38  # what an additive mask holds there, or less


@dataclass(frozen=True)
class AttentionSpec:
    """All that the code depends on; sizes and strides are not among it."""

    element: str  # of q, k, v and y
    mask: str  # "none", "causal", "i1": true is visible, or the element of a mask that is added
    scale: float
    level: Level
    few: bool = False  # a head of keys never has more queries than a row tile takes: half of the code

    @property
    def lanes(self) -> int:
        return self.level.lanes

    @property
    def tensor(self) -> str:
        return matrix(self.element, 4)

    @property
    def has_mask(self) -> bool:
        return self.mask not in ("none", "causal")

    def arguments(self) -> list[tuple[str, str]]:
        """Name and type of the operator's own."""
        mask = [("%mask", self.mask_kind)] if self.has_mask else []
        return [("%q", self.tensor), ("%k", self.tensor), ("%v", self.tensor), *mask, ("%y", self.tensor)]

    @property
    def mask_kind(self) -> str:
        return matrix(self.mask, 4)

    def handed(self) -> list[tuple[str, str]]:
        """What a block of queries is handed; of each row of the mask where it begins to do something, and its end."""
        seen = [("%mask_first", INDEX), ("%mask_end", INDEX)] if self.has_mask else []
        return [*self.arguments(), *seen, ("%scratch", FLAT)]


class Sizes:
    """The sizes, and the parts of a thread's scratch memory, as indices of the function being written."""

    def __init__(self, code: Code, spec: AttentionSpec) -> None:
        kind, step = spec.tensor, 2 * spec.lanes
        self.batch, self.heads, self.queries, self.depth = (code.dim("%q", axis, kind) for axis in range(4))
        self.kv_heads, self.slots = (code.dim("%k", axis, kind) for axis in (1, 2))
        self.width = code.dim("%v", 3, kind)
        self.group = code.div(self.heads, self.kv_heads)
        self.of_kv_head = code.mul(self.group, self.queries)
        self.pitch = code.up_to_multiple(self.depth, step)
        self.out_pitch = code.up_to_multiple(self.width, step)
        self.room = code.up_to_multiple(self.slots, step)
        # packed queries | scores | answers | a block of keys or values | sums of each query
        lengths = [
            code.mul(self.pitch, PANELS * step), code.mul(self.room, PANELS * step),
            code.mul(self.out_pitch, PANELS * step), code.mul(code.most(self.depth, self.width), SLOTS),
            code.index(PANELS * step),
        ]  # fmt: skip
        self.starts: list[str] = [code.index(0)]
        for length in lengths:
            self.starts.append(code.up_to_multiple(code.add(self.starts[-1], length), step))
        self.packed, self.scores, self.answers, self.block, self.sums, self.scratch = self.starts


def query(code: Code, sizes: Sizes, head: str, number: str) -> tuple[str, str]:
    """Head of queries and place in it of query `number` of a head of keys."""
    first = code.mul(head, sizes.group)
    return code.add(first, code.div(number, sizes.queries)), code.rem(number, sizes.queries)


def mask_row(code: Code, spec: AttentionSpec, batch: str, head: str, place: str) -> tuple[str, str]:
    """The row of the mask for a query: its three indices, where a size of 1 serves all, and its number."""
    dims = [code.dim("%mask", axis, spec.mask_kind) for axis in range(3)]
    at = [
        code.select(code.compare("eq", size, 1), 0, index)
        for size, index in zip(dims, (batch, head, place), strict=True)
    ]
    number = code.add(code.mul(code.add(code.mul(at[0], dims[1]), at[1]), dims[2]), at[2])
    return ", ".join(at), number


def seen(code: Code, spec: AttentionSpec, sizes: Sizes, batch: str, head: str, place: str) -> tuple[str, str]:
    """Of a query: the first slot that is hidden or has something added, and the end of what it sees."""
    if spec.mask == "none":
        return sizes.slots, sizes.slots
    if spec.mask == "causal":
        end = code.least(code.add(place, 1), sizes.slots)
        return end, end
    _, row = mask_row(code, spec, batch, head, place)
    return code.load("%mask_first", row, INDEX), code.load("%mask_end", row, INDEX)


def masked(
    code: Code, spec: AttentionSpec, query_at: tuple[str, str, str], slots: tuple[Value, str], scores: str, at: str,
    stride: Value,
) -> None:  # fmt: skip
    """Apply the mask to the scores of one query in [slots): score c lies at `at` + c * `stride` of `scores`."""
    if spec.mask == "none":
        return
    lowest = code.let("arith.constant 0xFF800000 : f32", "k")
    row = mask_row(code, spec, *query_at)[0] if spec.has_mask else ""
    with code.loop(slots[0], slots[1], 1) as c:
        where = f"{scores}[{code.add(at, code.mul(c.index, stride))}] : {FLAT}"
        before = code.let(f"memref.load {where}")
        if spec.mask == "causal":
            value = code.let(f"arith.select {code.compare('ule', c.index, query_at[2])}, {before}, {lowest} : f32")
        elif spec.mask == "i1":
            visible = code.load("%mask", f"{row}, {c.index}", spec.mask_kind)
            value = code.let(f"arith.select {visible}, {before}, {lowest} : f32")
        else:
            added = widen_scalar(code, code.load("%mask", f"{row}, {c.index}", spec.mask_kind), spec.mask)
            value = code.let(f"arith.addf {before}, {added} : f32")
        code.line(f"memref.store {value}, {where}")


def slots_view(code: Code, spec: AttentionSpec, tensor: str, at: tuple[str, str, Value], rows: str, width: str) -> str:
    """Rows of keys or values of one head as a matrix of the stored element."""
    kind, place = matrix(spec.element), f"[{at[0]}, {at[1]}, {code.index(at[2])}, 0]"
    return code.let(
        f"memref.subview {tensor}{place} [1, 1, {rows}, {width}] [1, 1, 1, 1] : {spec.tensor} to {kind}", "slots"
    )


@contextmanager
def blocks(
    code: Code, spec: AttentionSpec, sizes: Sizes, tensor: str, head: tuple[str, str], end: str, width: str, unpack: str
) -> Iterator[tuple[str, str, str]]:
    """Blocks of slots below `end` as float32: the first slot, how many, and a matrix of them."""
    with code.loop(0, end, SLOTS) as block:
        rows = code.least(code.sub(end, block.index), SLOTS)
        view = slots_view(code, spec, tensor, (*head, block.index), rows, width)
        if spec.element != "f32":
            own = scratch_matrix(code, "%scratch", sizes.block, SLOTS, width)
            code.line(
                f"func.call @{unpack}({view}, {rows}, {width}, {own}) : "
                f"({matrix(spec.element)}, index, index, {matrix('f32')}) -> ()"
            )
            view = own
        yield block.index, rows, view
