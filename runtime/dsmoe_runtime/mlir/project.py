"""One item of work of each product: a block of weight rows of one expert, times all tokens of that expert.

`@gate_up`  rows n of gate and of up -> activation -> rows n of the hidden state
`@down`     rows h of down           -> columns h of the answers

Tokens in panels go through lane tiles, in blocks of 256 values of k (a panel's part, 16 KiB, stays in the first-level
cache; the rows' part, 96 KiB, in the second) and at most 128 tokens at a time. The rest goes through row tiles, twelve
rows of weights at a time, each against all of those tokens before the next twelve are touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsmoe_runtime.mlir.code import Code, Value
from dsmoe_runtime.mlir.formats import widen_scalar
from dsmoe_runtime.mlir.lane_tiles import TYPES
from dsmoe_runtime.mlir.row_tiles import MOST, WIDE, store_step, types
from dsmoe_runtime.mlir.sort import INDEX
from dsmoe_runtime.mlir.transpose import EIGHT, SIDE, transpose
from dsmoe_runtime.mlir.vector_math import VectorMath
from dsmoe_runtime.mlir.weights import Stack, scratch_matrix

FLAT = "memref<?xf32>"
BLOCK_ROWS = 96  # rows of weights of an item, gate and up together
BLOCK_K = 256
BLOCK_TOKENS = 128
ROWS_AT_ONCE = 12  # rows of weights that all row tiles use before the next ones
SUMS = BLOCK_ROWS * BLOCK_TOKENS
SCRATCH = SUMS + BLOCK_ROWS * BLOCK_K  # float32s of a thread: sums, and weights unpacked
PANELS = f"%hit_expert: {INDEX}, %hit_panel: {INDEX}, %hit_rows: {INDEX}, %panel_slot: {INDEX}"

Part = tuple[str, int]  # the first row of an item's block and the step to the next


@dataclass(frozen=True)
class Product:
    """What `@gate_up` and `@down` have in common: weights, their bias, and the vectors they are made of."""

    stack: Stack
    bias: str | None
    lanes: int

    @property
    def bias_kind(self) -> str:
        return f"memref<?x?x{self.stack.element}>"

    def bias_value(self, code: Code, expert: str, row: str) -> str:
        """A row's bias as a float32; 0 without one."""
        if self.bias is None:
            return code.constant(0.0, "f32")
        value = code.let(f"memref.load {self.bias}[{expert}, {row}] : {self.bias_kind}")
        return widen_scalar(code, value, self.stack.element)


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
    each = BLOCK_ROWS // len(parts)
    first_slot, last_slot = (code.let(f"memref.load %panel_slot[{panel}] : {INDEX}") for panel in panels)
    width = code.sub(last_slot, first_slot)
    sums = scratch_matrix(code, "%scratch", 0, BLOCK_ROWS, BLOCK_TOKENS)
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
            if not product.stack.in_place:
                own = scratch_matrix(code, "%scratch", SUMS + number * each * BLOCK_K, each, BLOCK_K)
                kinds = f"({product.stack.rows_kind}, index, index, {WIDE}) -> ()"
                label = product.stack.name.removeprefix("%")
                code.line(f"func.call @unpack_{label}({view}, {rows}, {depth}, {own}) : {kinds}")
                view = own
            views.append(view)
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


class each_panel:
    """A loop over panels: the first row of the workspace and the number of rows of each."""

    def __init__(self, code: Code, panels: tuple[str, str]) -> None:
        self.code, self.loop = code, code.loop(panels[0], panels[1], 1)

    def __enter__(self) -> tuple[str, str]:
        code, panel = self.code, self.loop.__enter__().index
        slot = code.let(f"memref.load %panel_slot[{panel}] : {INDEX}")
        after = code.let(f"memref.load %panel_slot[{code.add(panel, 1)}] : {INDEX}")
        return slot, code.sub(after, slot)

    def __exit__(self, *error: object) -> None:
        self.loop.__exit__(None, None, None)


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
                        f"func.call @rows_{tokens}({view}, {n.index}, {size}, {x}, {base}, %pitch, {target}, {token}, "
                        f"{at}, {stop}) : ({kinds}, index) -> ()"
                    )


def gate_up_item(code: Code, product: Product, layout: str, activation: str) -> None:
    """Write `@gate_up(hit, block, w, bias?, x, pitch, hidden, hidden_pitch, scratch, panels, alpha, limit)`."""
    lanes, parts_count = product.lanes, 1 if layout.startswith("ungated") else 2
    each = BLOCK_ROWS // parts_count
    stack, math = product.stack, VectorMath(code, lanes)
    bias = f", {product.bias}: {product.bias_kind}" if product.bias else ""
    arguments = (
        f"%hit: index, %block: index, {stack.name}: {stack.kind}{bias}, %x: {FLAT}, %pitch: index, %hidden: {FLAT}, "
        f"%hidden_pitch: index, %scratch: {FLAT}, %mine: index, {PANELS}, %alpha: f32, %limit: f32"
    )
    with code.function("gate_up", arguments):
        width = code.div(code.let(f"memref.dim {stack.name}, {code.index(1)} : {stack.kind}"), parts_count)
        size = code.let(f"memref.dim {stack.name}, {code.index(2)} : {stack.kind}")
        expert = code.let(f"memref.load %hit_expert[%hit] : {INDEX}")
        begin = code.mul("%block", each)
        rows = code.least(code.sub(width, begin), each)
        if layout.startswith("interleaved"):
            even = code.mul(begin, 2)
            parts = [(even, 2), (code.add(even, 1), 2)]
        else:
            parts = [(begin, 1), (code.add(begin, width), 1)][:parts_count]
        alpha, limit = math.spread("%alpha"), math.spread("%limit")

        def activate(load: Callable[[int], str]) -> str:
            up = load(each) if parts_count == 2 else None
            return math.activation(activation, load(0), up, alpha, limit)

        panel, lane_end, end = panels_of_hit(code)
        with code.loop(panel, lane_end, BLOCK_TOKENS // (2 * lanes)) as block:
            panels = (block.index, code.least(code.add(block.index, BLOCK_TOKENS // (2 * lanes)), lane_end))
            sums = lane_products(code, product, expert, parts, rows, size, "%x", panels)
            first_slot = code.let(f"memref.load %panel_slot[{panels[0]}] : {INDEX}")
            with each_panel(code, panels) as (slot, panel_width), code.loop(0, rows, 1) as n:
                to = code.add(code.mul(slot, "%hidden_pitch"), code.mul(code.add(begin, n.index), panel_width))
                column = code.sub(slot, first_slot)
                with code.loop(0, panel_width, lanes) as lane:
                    at = code.add(column, lane.index)

                    def load(offset: int, n: str = n.index, at: str = at) -> str:
                        return code.let(f"vector.load {sums}[{code.add(n, offset)}, {at}] : {WIDE}, {math.kind}")

                    value = activate(load)
                    code.line(f"vector.store {value}, %hidden[{code.add(to, lane.index)}] : {FLAT}, {math.kind}")
        if stack.transposed:
            return
        with code.when(code.compare("ult", lane_end, end)):
            first_slot, last_slot = (code.let(f"memref.load %panel_slot[{p}] : {INDEX}") for p in (lane_end, end))
            tokens = code.sub(last_slot, first_slot)
            sums = scratch_matrix(code, "%scratch", 0, BLOCK_TOKENS, BLOCK_ROWS)
            zero = code.constant(0.0, math.kind)
            with code.loop(0, tokens, 1) as token, code.loop(0, BLOCK_ROWS, lanes) as n:
                code.line(f"vector.store {zero}, {sums}[{token.index}, {n.index}] : {WIDE}, {math.kind}")
            for number, part in enumerate(parts):
                if product.bias:

                    def down_the_tokens(n: str, value: str, number: int = number) -> None:
                        with code.loop(0, tokens, 1) as token:
                            at = code.add(n, number * each)
                            code.line(f"memref.store {value}, {sums}[{token.index}, {at}] : {WIDE}")

                    fill(code, product, expert, part, rows, down_the_tokens)
                view = stack.rows(code, expert, part[0], rows, part[1], 0, size)
                row_products(code, product, view, rows, size, "%x", (lane_end, end), (sums, first_slot, number * each))
            with code.loop(0, tokens, 1) as token, code.loop(0, rows, 2 * lanes) as n:
                halves = []
                for half in range(2):
                    at = code.add(n.index, half * lanes)

                    def load(offset: int, token: str = token.index, at: str = at) -> str:
                        return code.let(f"vector.load {sums}[{token}, {code.add(at, offset)}] : {WIDE}, {math.kind}")

                    halves.append(activate(load))
                row = code.mul(code.add(first_slot, token.index), "%hidden_pitch")
                to = code.add(row, code.add(begin, n.index))
                store_step(code, stack.element, lanes, (halves[0], halves[1]), "%hidden", to)


def panels_of_hit(code: Code) -> tuple[str, str, str]:
    """The first panel of the hit expert, the first of its row tiles, and their end."""
    panel = code.let(f"memref.load %hit_panel[%hit] : {INDEX}")
    lane_end = code.let(f"memref.load %hit_rows[%hit] : {INDEX}")
    end = code.let(f"memref.load %hit_panel[{code.add('%hit', 1)}] : {INDEX}")
    return panel, lane_end, end


def down_item(code: Code, product: Product) -> None:
    """Write `@down(hit, block, w, bias?, x, pitch, answers, scratch, panels)`; x is the hidden state."""
    lanes, stack = product.lanes, product.stack
    bias = f", {product.bias}: {product.bias_kind}" if product.bias else ""
    arguments = (
        f"%hit: index, %block: index, {stack.name}: {stack.kind}{bias}, %x: {FLAT}, %pitch: index, "
        f"%answers: memref<?x?xf32>, %scratch: {FLAT}, %mine: index, {PANELS}"
    )
    with code.function("down", arguments):
        height = code.let(f"memref.dim {stack.name}, {code.index(1)} : {stack.kind}")
        size = code.let(f"memref.dim {stack.name}, {code.index(2)} : {stack.kind}")
        expert = code.let(f"memref.load %hit_expert[%hit] : {INDEX}")
        begin = code.mul("%block", BLOCK_ROWS)
        rows = code.least(code.sub(height, begin), BLOCK_ROWS)
        answers = code.let(f"memref.cast %answers : memref<?x?xf32> to {WIDE}")
        panel, lane_end, end = panels_of_hit(code)
        with code.loop(panel, lane_end, BLOCK_TOKENS // (2 * lanes)) as block:
            panels = (block.index, code.least(code.add(block.index, BLOCK_TOKENS // (2 * lanes)), lane_end))
            sums = lane_products(code, product, expert, [(begin, 1)], rows, size, "%x", panels)
            _write_answers(code, sums, rows, begin, answers, panels)
        if stack.transposed:
            return
        with code.when(code.compare("ult", lane_end, end)):
            first_slot, last_slot = (code.let(f"memref.load %panel_slot[{p}] : {INDEX}") for p in (lane_end, end))

            def start(n: str, value: str) -> None:
                with code.loop(first_slot, last_slot, 1) as slot:
                    code.line(f"memref.store {value}, {answers}[{slot.index}, {code.add(n, begin)}] : {WIDE}")

            fill(code, product, expert, (begin, 1), rows, start)
            view = stack.rows(code, expert, begin, rows, 1, 0, size)
            zero = code.index(0)
            row_products(code, product, view, rows, size, "%x", (lane_end, end), (answers, zero, begin))


def _write_answers(code: Code, sums: str, rows: str, begin: str, answers: str, panels: tuple[str, str]) -> None:
    """answers[slot, begin + n] = sums[n, slot], in transposed blocks of 8 by 8."""
    first_slot, last_slot = (code.let(f"memref.load %panel_slot[{p}] : {INDEX}") for p in panels)
    tokens = code.sub(last_slot, first_slot)
    whole = code.down_to_multiple(rows, SIDE)
    with code.loop(0, tokens, SIDE) as token:
        slot = code.add(first_slot, token.index)
        with code.loop(0, whole, SIDE) as n:
            block = [
                code.let(f"vector.load {sums}[{code.add(n.index, row)}, {token.index}] : {WIDE}, {EIGHT}")
                for row in range(SIDE)
            ]
            for lane, column in enumerate(transpose(code, block)):
                at = f"{answers}[{code.add(slot, lane)}, {code.add(begin, n.index)}]"
                code.line(f"vector.store {column}, {at} : {WIDE}, {EIGHT}")
        with code.loop(whole, rows, 1) as n, code.loop(0, SIDE, 1) as lane:
            value = code.let(f"memref.load {sums}[{n.index}, {code.add(token.index, lane.index)}] : {WIDE}")
            at = f"{answers}[{code.add(slot, lane.index)}, {code.add(begin, n.index)}]"
            code.line(f"memref.store {value}, {at} : {WIDE}")
