"""One item of the second product: rows of down of one expert -> as many columns of the answers of its tokens.

Lane tiles leave [rows, tokens], which is transposed on its way out; row tiles add to the answers where they lie.
"""

from __future__ import annotations

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.products import (
    BLOCK_ROWS,
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
from dsmoe_runtime.mlir.transpose import EIGHT, SIDE, transpose


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
            for number, column in enumerate(transpose(code, block)):
                at = f"{answers}[{code.add(slot, number)}, {code.add(begin, n.index)}]"
                code.line(f"vector.store {column}, {at} : {WIDE}, {EIGHT}")
        with code.loop(whole, rows, 1) as n, code.loop(0, SIDE, 1) as lane:
            value = code.let(f"memref.load {sums}[{n.index}, {code.add(token.index, lane.index)}] : {WIDE}")
            at = f"{answers}[{code.add(slot, lane.index)}, {code.add(begin, n.index)}]"
            code.line(f"memref.store {value}, {at} : {WIDE}")
