"""What both products of an expert share: a block of weight rows, times all tokens of the expert.

Tokens in panels go through lane tiles, in blocks of 192 values of k (a panel's part, 12 KiB, stays in the first-level
cache; the rows' part, 72 KiB, or 144 with sixteen lanes, in the second) and at most 128 tokens at a time. The rest goes
through row tiles, twelve rows of weights at a time, each against all of those tokens before the next are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dsmoe_runtime.mlir.code import Code, Value
from dsmoe_runtime.mlir.formats import widen_scalar
from dsmoe_runtime.mlir.function import matrix
from dsmoe_runtime.mlir.lane_tiles import TYPES, lane_rows
from dsmoe_runtime.mlir.levels import Level
from dsmoe_runtime.mlir.row_tiles import MOST, WIDE, row_range, types
from dsmoe_runtime.mlir.sort import INDEX
from dsmoe_runtime.mlir.weights import Stack, scratch_matrix, unpack

FLAT = "memref<?xf32>"
BLOCK_K = 192  # as many are summed in one register; more cost accuracy, fewer short reads
BLOCK_TOKENS = 128
COPIED = 8  # vectors of tokens: for more, float32 weights are copied too
ROWS_AT_ONCE = 12  # rows of weights that all row tiles use before the next ones
PANELS = f"%hit_expert: {INDEX}, %hit_panel: {INDEX}, %hit_rows: {INDEX}, %panel_slot: {INDEX}"

Part = tuple[str, int]  # the first row of an item's block and the step to the next


def block_rows(lanes: int) -> int:
    """Rows of weights of an item, gate and up together: either half is a whole number of steps of 2 L."""
    return 12 * lanes


def scratch_size(lanes: int) -> int:
    """Float32s of a thread: sums, and weights unpacked."""
    return block_rows(lanes) * (BLOCK_TOKENS + BLOCK_K)


@dataclass(frozen=True)
class Product:
    """What every item has in common: weights %w, their bias %bias, and the vectors they are made of."""

    stack: Stack
    bias: str | None  # the element of its bias, [E, N]
    level: Level

    @property
    def lanes(self) -> int:
        return self.level.lanes

    @property
    def block_rows(self) -> int:
        return block_rows(self.lanes)

    @property
    def arguments(self) -> str:
        """What a function of this product is handed first."""
        return f"%w: {self.stack.kind}" + (f", %bias: {self.bias_kind}" if self.bias else "")

    @property
    def kinds(self) -> str:
        """Their types."""
        return self.stack.kind + (f", {self.bias_kind}" if self.bias else "")

    @property
    def bias_kind(self) -> str:
        return matrix(self.bias) if self.bias else ""

    def bias_value(self, code: Code, expert: str, row: str) -> str:
        """A row's bias as a float32; 0 without one."""
        if self.bias is None:
            return code.constant(0.0, "f32")
        return widen_scalar(code, code.load("%bias", f"{expert}, {row}", self.bias_kind), self.bias)


def tiles(code: Code, product: Product) -> None:
    """Write the register tiles that a product is made of, where they are not there yet."""
    lanes, stack = product.lanes, product.stack
    for vectors in (1, 2):
        lane_rows(code, lanes, vectors, product.level.tile_rows)
    if not stack.transposed:
        for tokens in range(1, MOST + 1):
            row_range(code, stack.element, lanes, tokens)
    unpack(code, stack, lanes)


def fill(code: Code, product: Product, expert: str, part: Part, rows: str, write: Callable[[str, str], None]) -> None:
    """`write(n, value)` for each row of a part, with its bias or 0."""
    with code.loop(0, rows, 1) as n:
        row = code.add(part[0], code.mul(n.index, part[1]))
        write(n.index, product.bias_value(code, expert, row))


def lane_products(
    code: Code, product: Product, expert: str, parts: list[Part], rows: str, size: str, x: str, panels: tuple[str, str]
) -> str:
    """Sums of one block of panels in the thread's scratch, [part x rows, tokens], bias included -> that matrix."""
    lanes, pitch = product.lanes, code.index("%pitch")
    each = product.block_rows // len(parts)
    first_slot, last_slot = (code.let(f"memref.load %panel_slot[{panel}] : {INDEX}") for panel in panels)
    width = code.sub(last_slot, first_slot)
    sums = scratch_matrix(code, "%scratch", 0, product.block_rows, BLOCK_TOKENS)
    for number, part in enumerate(parts):

        def spread(n: str, value: str, number: int = number) -> None:
            kind = f"vector<{lanes}xf32>"
            vector = code.let(f"vector.broadcast {value} : f32 to {kind}")
            with code.loop(0, width, lanes) as lane:
                code.line(f"vector.store {vector}, {sums}[{code.add(n, number * each)}, {lane.index}] : {WIDE}, {kind}")

        fill(code, product, expert, part, rows, spread)
    with code.loop(0, size, BLOCK_K) as k:
        depth = code.least(code.sub(size, k.index), BLOCK_K)
        views = []
        for number, (first, step) in enumerate(parts):
            view = product.stack.rows(code, expert, first, rows, step, k.index, depth)
            views.append(_for_lanes(code, product, view, number * each, each, rows, depth, width))
        ahead = code.index(BLOCK_K)
        with each_panel(code, panels) as (slot, panel):
            base = code.add(code.mul(slot, pitch), code.mul(k.index, panel))
            column, zero = code.sub(slot, first_slot), code.index(0)
            for vectors in (1, 2):
                with code.when(code.compare("eq", panel, vectors * lanes)):
                    for number, view in enumerate(views):
                        out = code.index(number * each)
                        code.line(
                            f"func.call @lanes_{vectors * lanes}({view}, {zero}, {depth}, {x}, {base}, {sums}, {out}, "
                            f"{column}, {ahead}, {rows}) : ({TYPES}, index) -> ()"
                        )
    return sums


def _for_lanes(
    code: Code, product: Product, view: str, start: int, height: int, rows: str, depth: str, width: str
) -> str:
    """Some rows of weights as lane tiles read them: in the thread's scratch if that pays, or where they lie.

    Rows that lie a power of two apart share few sets of a cache; more than four panels pay for a copy that does not.
    """
    stack, lanes = product.stack, product.lanes
    kinds = f"({stack.rows_kind}, index, index, {WIDE}) -> ()"

    def copy() -> str:
        used = product.block_rows * BLOCK_TOKENS  # by the sums
        own = scratch_matrix(code, "%scratch", used + start * BLOCK_K, height, BLOCK_K)
        code.line(f"func.call @{stack.unpack}({view}, {rows}, {depth}, {own}) : {kinds}")
        return own

    if not stack.in_place:
        return copy()
    chosen = code.name("rows")
    with code.region(f"{chosen} = scf.if {code.compare('ugt', width, COPIED * lanes)} -> ({WIDE})", tail=None):
        code.line(f"scf.yield {copy()} : {WIDE}")
    with code.region("} else"):
        code.line(f"scf.yield {view} : {WIDE}")
    return chosen


@contextmanager
def each_panel(code: Code, panels: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """A loop over panels: the first row of the workspace and the number of rows of each."""
    with code.loop(panels[0], panels[1], 1) as panel:
        slot = code.let(f"memref.load %panel_slot[{panel.index}] : {INDEX}")
        after = code.let(f"memref.load %panel_slot[{code.add(panel.index, 1)}] : {INDEX}")
        yield slot, code.sub(after, slot)


def row_products(
    code: Code,
    product: Product,
    view: str,
    rows: str,
    size: str,
    x: str,
    panels: tuple[str, str],
    out: tuple[str, str, Value],
) -> None:
    """out[token, column + n] += products of the rows of `view` with every token in groups of up to three."""
    target, first_slot, column = out
    kinds = types(product.stack.element)
    with code.loop(0, rows, ROWS_AT_ONCE) as n:
        stop = code.least(code.add(n.index, ROWS_AT_ONCE), rows)
        with each_panel(code, panels) as (slot, group):
            base, token = code.mul(slot, "%pitch"), code.sub(slot, first_slot)
            at = code.add(n.index, column)
            for tokens in range(1, MOST + 1):
                with code.when(code.compare("eq", group, tokens)):
                    code.line(
                        f"func.call @rows_{product.stack.element}_{tokens}({view}, {n.index}, {size}, {x}, {base}, "
                        f"%pitch, {target}, {token}, {at}, {stop}) : ({kinds}, index) -> ()"
                    )


def panels_of_hit(code: Code) -> tuple[str, str, str]:
    """The first panel of the hit expert, the first of its row tiles, and their end."""
    panel = code.let(f"memref.load %hit_panel[%hit] : {INDEX}")
    lane_end = code.let(f"memref.load %hit_rows[%hit] : {INDEX}")
    end = code.let(f"memref.load %hit_panel[{code.add('%hit', 1)}] : {INDEX}")
    return panel, lane_end, end
