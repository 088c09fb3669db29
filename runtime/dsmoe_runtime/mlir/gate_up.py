"""One item of the first product: rows of gate and up of one expert -> activation -> as many values of the hidden state.

    sums[gate n | up n, token] = bias + rows . x          lane tiles: [rows, tokens]; row tiles: [tokens, rows]
    hidden[token, n] = activation(sums[gate n], sums[up n])

The hidden state takes the shape in which the second product wants it: panels for lane tiles, padded rows for row tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.products import (
    BLOCK_TOKENS,
    FLAT,
    PANELS,
    Product,
    each_panel,
    fill,
    lane_products,
    panels_of_hit,
    row_products,
)
from dsmoe_runtime.mlir.row_tiles import WIDE, store_step
from dsmoe_runtime.mlir.sort import INDEX
from dsmoe_runtime.mlir.vector_math import VectorMath
from dsmoe_runtime.mlir.weights import scratch_matrix


@dataclass(frozen=True)
class Activation:
    """One of ops/activation.py, with its constants."""

    name: str
    alpha: float
    limit: float


def parts_of(layout: str) -> int:
    """Rows of the first product for each value of the hidden state: gate and up, or one alone."""
    return 1 if layout.startswith("ungated") else 2


def gate_up_item(code: Code, product: Product, label: str, layout: str, activation: Activation) -> None:
    """Write `@gate_up_{label}(hit, block, w, bias?, x, pitch, hidden, hidden_pitch, scratch, panels)`."""
    lanes, parts_count = product.lanes, parts_of(layout)
    if f"gate_up_{label}" in code.functions:
        return
    each = product.block_rows // parts_count
    stack, math = product.stack, VectorMath(code, lanes)
    arguments = (
        f"%hit: index, %block: index, {product.arguments}, %x: {FLAT}, %pitch: index, %hidden: {FLAT}, "
        f"%hidden_pitch: index, %scratch: {FLAT}, %mine: index, {PANELS}"
    )
    with code.function(f"gate_up_{label}", arguments):
        width = code.div(code.dim("%w", 1, stack.kind), parts_count)
        size = code.dim("%w", 2, stack.kind)
        expert = code.let(f"memref.load %hit_expert[%hit] : {INDEX}")
        begin = code.mul("%block", each)
        rows = code.least(code.sub(width, begin), each)
        if layout.startswith("interleaved"):
            even = code.mul(begin, 2)
            parts = [(even, 2), (code.add(even, 1), 2)]
        else:
            parts = [(begin, 1), (code.add(begin, width), 1)][:parts_count]
        alpha, limit = math.constant(activation.alpha), math.constant(activation.limit)

        def activate(load: Callable[[int], str]) -> str:
            up = load(each) if parts_count == 2 else None
            return math.activation(activation.name, load(0), up, alpha, limit)

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
            sums = scratch_matrix(code, "%scratch", 0, BLOCK_TOKENS, product.block_rows)
            zero = code.constant(0.0, math.kind)
            with code.loop(0, tokens, 1) as token, code.loop(0, product.block_rows, lanes) as n:
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

                    def load_row(offset: int, token: str = token.index, at: str = at) -> str:
                        return code.let(f"vector.load {sums}[{token}, {code.add(at, offset)}] : {WIDE}, {math.kind}")

                    halves.append(activate(load_row))
                row = code.mul(code.add(first_slot, token.index), "%hidden_pitch")
                to = code.add(row, code.add(begin, n.index))
                store_step(code, stack.element, lanes, (halves[0], halves[1]), "%hidden", to)
