"""Tokens gathered by expert into the workspace: panels of lane tiles transposed, rows of row tiles padded with zeros.

    rows of x, in the order of experts        panel of P tokens, [H][P]          group of row tiles, [tokens][pitch]
      t0: a0 a1 a2 ...                          a0 b0 c0 d0 ...                     a0 a1 a2 ... 0 0
      t1: b0 b1 b2 ...               ->         a1 b1 c1 d1 ...          or         b0 b1 b2 ... 0 0

All of it is float32. Row r of the workspace begins at r * pitch in both, so a panel of P rows fills P * pitch numbers.
"""

from __future__ import annotations

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.formats import widen, widen_scalar
from dsmoe_runtime.mlir.function import matrix
from dsmoe_runtime.mlir.row_tiles import store_in_step, store_step
from dsmoe_runtime.mlir.sort import INDEX
from dsmoe_runtime.mlir.transpose import EIGHT, SIDE, transpose

FLAT = "memref<?xf32>"


def gather(code: Code, element: str, weights: str, lanes: int) -> None:
    """Write `@gather_{x}_{w}(x, order, slot, panel, packed, pitch)`: one panel, whatever tiles it is for.

    Row tiles for `weights` decide in which order a row of x is stored.
    """
    if f"gather_{element}_{weights}" in code.functions:
        return
    _lanes(code, element)
    tokens = matrix(element)
    arguments = f"%x: {tokens}, %order: {INDEX}, %slot: index, %panel: index, %packed: {FLAT}, %pitch: index"
    _row(code, element, weights, lanes)
    with code.function(f"gather_{element}_{weights}", arguments):
        with code.when(code.compare("uge", "%panel", lanes)):
            code.line(
                f"func.call @gather_lanes_{element}(%x, %order, %slot, %panel, %packed, %pitch) : "
                f"({tokens}, {INDEX}, index, index, {FLAT}, index) -> ()"
            )
        few, end = code.compare("ult", "%panel", lanes), code.add("%slot", "%panel")
        with code.when(few), code.loop("%slot", end, 1) as one:
            code.line(
                f"func.call @gather_row_{element}_{weights}(%x, %order, {one.index}, %packed, %pitch) : "
                f"({tokens}, {INDEX}, index, {FLAT}, index) -> ()"
            )


def gather_panel(code: Code, element: str, weights: str, x: str, label: str, panel: str, pitch: str) -> None:
    """Call it for a panel of the plan and the workspace under `label`."""
    slot = code.load(f"%{label}_panel_slot", panel, INDEX)
    width = code.sub(code.load(f"%{label}_panel_slot", code.add(panel, 1), INDEX), slot)
    code.line(
        f"func.call @gather_{element}_{weights}({x}, %{label}_order, {slot}, {width}, %{label}_packed, {pitch}) : "
        f"({matrix(element)}, {INDEX}, index, index, {FLAT}, index) -> ()"
    )


def _lanes(code: Code, element: str) -> None:
    if f"gather_lanes_{element}" in code.functions:
        return
    tokens = matrix(element)
    common = f"%x: {tokens}, %order: {INDEX}, %slot: index"
    with code.function(f"gather_lanes_{element}", f"{common}, %panel: index, %packed: {FLAT}, %pitch: index"):
        size = code.let(f"memref.dim %x, {code.index(1)} : {tokens}")
        whole = code.down_to_multiple(size, SIDE)
        start = code.mul("%slot", "%pitch")
        with code.loop(0, "%panel", SIDE) as group:
            rows = []
            for lane in range(SIDE):
                at = code.add(code.add("%slot", group.index), lane)
                rows.append(code.let(f"memref.load %order[{at}] : {INDEX}"))
            base = code.add(start, group.index)
            with code.loop(0, whole, SIDE) as k:
                loaded = []
                for row in rows:
                    raw = code.let(f"vector.load %x[{row}, {k.index}] : {tokens}, vector<{SIDE}x{element}>")
                    loaded.append(widen(code, raw, element, SIDE))
                for n, column in enumerate(transpose(code, loaded)):
                    to = code.add(base, code.mul(code.add(k.index, n), "%panel"))
                    code.line(f"vector.store {column}, %packed[{to}] : {FLAT}, {EIGHT}")
            with code.loop(whole, size, 1) as k:
                to = code.add(base, code.mul(k.index, "%panel"))
                for lane, row in enumerate(rows):
                    value = widen_scalar(code, code.let(f"memref.load %x[{row}, {k.index}] : {tokens}"), element)
                    code.line(f"memref.store {value}, %packed[{code.add(to, lane)}] : {FLAT}")


def _row(code: Code, element: str, weights: str, lanes: int) -> None:
    tokens = matrix(element)
    arguments = f"%x: {tokens}, %order: {INDEX}, %slot: index, %packed: {FLAT}, %pitch: index"
    with code.function(f"gather_row_{element}_{weights}", arguments):
        size = code.let(f"memref.dim %x, {code.index(1)} : {tokens}")
        step, zero = 2 * lanes, code.constant(0.0, f"vector<{lanes}xf32>")
        whole = code.down_to_multiple(size, step)
        base = code.mul("%slot", "%pitch")
        token = code.let(f"memref.load %order[%slot] : {INDEX}")
        with code.loop(0, whole, step) as k:
            halves = []
            for half in range(2):
                at = f"%x[{token}, {code.add(k.index, half * lanes)}] : {tokens}, vector<{lanes}x{element}>"
                halves.append(widen(code, code.let(f"vector.load {at}"), element, lanes))
            store_step(code, weights, lanes, (halves[0], halves[1]), "%packed", code.add(base, k.index))
        with code.loop(whole, size, step) as k:
            at = code.add(base, k.index)
            store_step(code, weights, lanes, (zero, zero), "%packed", at)
            with code.loop(whole, size, 1) as one:
                value = widen_scalar(code, code.let(f"memref.load %x[{token}, {one.index}] : {tokens}"), element)
                store_in_step(code, weights, lanes, value, "%packed", at, code.sub(one.index, whole))
