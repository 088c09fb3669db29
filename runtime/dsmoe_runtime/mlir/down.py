"""One item of the second product: rows of down of one expert -> as many columns of the answers of its tokens.

Lane tiles leave [rows, tokens], which is transposed on its way out; row tiles add to the answers where they lie.
"""

from __future__ import annotations

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.products import (
    BLOCK_TOKENS,
    FLAT,
    PANELS,
    Product,
    fill,
    lane_products,
    panels_of_hit,
    row_products,
)
from dsmoe_runtime.mlir.row_tiles import WIDE
from dsmoe_runtime.mlir.sort import INDEX
from dsmoe_runtime.mlir.transpose import write_transposed

ANSWERS = "memref<?x?xf32>"


def down_item(code: Code, product: Product, label: str) -> None:
    """Write `@down_{label}(hit, block, w, bias?, x, pitch, answers, scratch, panels)`; x is the hidden state."""
    lanes, stack = product.lanes, product.stack
    if f"down_{label}" in code.functions:
        return
    arguments = (
        f"%hit: index, %block: index, {product.arguments}, %x: {FLAT}, %pitch: index, "
        f"%answers: {ANSWERS}, %scratch: {FLAT}, %mine: index, {PANELS}"
    )
    with code.function(f"down_{label}", arguments):
        height, size = (code.dim("%w", axis, stack.kind) for axis in (1, 2))
        expert = code.let(f"memref.load %hit_expert[%hit] : {INDEX}")
        begin = code.mul("%block", product.block_rows)
        rows = code.least(code.sub(height, begin), product.block_rows)
        answers = code.let(f"memref.cast %answers : {ANSWERS} to {WIDE}")
        panel, lane_end, end = panels_of_hit(code)
        with code.loop(panel, lane_end, BLOCK_TOKENS // (2 * lanes)) as block:
            panels = (block.index, code.least(code.add(block.index, BLOCK_TOKENS // (2 * lanes)), lane_end))
            sums = lane_products(code, product, expert, [(begin, 1)], rows, size, "%x", panels)
            first_slot, last_slot = (code.load("%panel_slot", panel, INDEX) for panel in panels)
            write_transposed(code, sums, rows, (first_slot, last_slot), None, "f32", (answers, WIDE), begin)
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
