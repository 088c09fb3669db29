"""One item of y = x w^T + b: some rows of w, times all tokens of some panels -> as many columns of y, rounded once.

Tokens are all in one plan, in their own order, so that row n of the workspace is row n of x and of y.
"""

from __future__ import annotations

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.formats import narrow, narrow_scalar
from dsmoe_runtime.mlir.function import matrix
from dsmoe_runtime.mlir.products import (
    BLOCK_TOKENS,
    FLAT,
    Product,
    fill,
    lane_products,
    row_products,
)
from dsmoe_runtime.mlir.row_tiles import WIDE
from dsmoe_runtime.mlir.sort import INDEX
from dsmoe_runtime.mlir.transpose import write_transposed
from dsmoe_runtime.mlir.weights import scratch_matrix


def linear_item(code: Code, product: Product, label: str, output: str) -> None:
    """Write `@linear_{label}(begin, rows, panel, lane_end, end, w, bias?, x, pitch, y, scratch, mine, panel_slot)`.

    Panels [panel, lane_end) are for lane tiles, [lane_end, end) for row tiles.
    """
    lanes, y = product.lanes, matrix(output)
    arguments = (
        f"%begin: index, %rows: index, %panel: index, %lane_end: index, %end: index, {product.arguments}, %x: {FLAT}, "
        f"%pitch: index, %y: {y}, %scratch: {FLAT}, %mine: index, %panel_slot: {INDEX}"
    )
    with code.function(f"linear_{label}", arguments):
        zero = code.index(0)
        tokens = code.dim("%y", 0, y)
        size = code.dim("%w", 2, product.stack.kind)
        part = ("%begin", 1)
        with code.loop("%panel", "%lane_end", BLOCK_TOKENS // (2 * lanes)) as block:
            panels = (block.index, code.least(code.add(block.index, BLOCK_TOKENS // (2 * lanes)), "%lane_end"))
            sums = lane_products(code, product, zero, [part], "%rows", size, "%x", panels)
            first, last = (code.load("%panel_slot", panel, INDEX) for panel in panels)
            write_transposed(code, sums, "%rows", (first, last), tokens, output, ("%y", y), "%begin")
        if product.stack.transposed:
            return
        with code.when(code.compare("ult", "%lane_end", "%end")):
            first, last = (code.load("%panel_slot", panel, INDEX) for panel in ("%lane_end", "%end"))
            count = code.sub(last, first)
            sums = scratch_matrix(code, "%scratch", 0, BLOCK_TOKENS, product.block_rows)

            def start(n: str, value: str) -> None:
                with code.loop(0, count, 1) as token:
                    code.line(f"memref.store {value}, {sums}[{token.index}, {n}] : {WIDE}")

            fill(code, product, zero, part, "%rows", start)
            view = product.stack.rows(code, zero, "%begin", "%rows", 1, 0, size)
            row_products(code, product, view, "%rows", size, "%x", ("%lane_end", "%end"), (sums, first, 0))
            whole = code.down_to_multiple("%rows", lanes)
            with code.loop(0, count, 1) as token:
                row = code.add(first, token.index)
                with code.loop(0, whole, lanes) as n:
                    value = code.let(f"vector.load {sums}[{token.index}, {n.index}] : {WIDE}, vector<{lanes}xf32>")
                    at = f"%y[{row}, {code.add('%begin', n.index)}] : {y}"
                    code.line(f"vector.store {narrow(code, value, output, lanes)}, {at}, vector<{lanes}x{output}>")
                with code.loop(whole, "%rows", 1) as n:
                    value = code.load(sums, f"{token.index}, {n.index}", WIDE)
                    at = f"%y[{row}, {code.add('%begin', n.index)}] : {y}"
                    code.line(f"memref.store {narrow_scalar(code, value, output)}, {at}")
