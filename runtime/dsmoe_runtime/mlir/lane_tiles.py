"""Register tiles for many tokens: tokens lie along the lanes, and each weight is broadcast once for 2 L of them.

`@lanes_PxR`: c[n, p] += sum_k w[n, k] x[k, p] for R rows of weights and a panel of P tokens, P = L or 2 L:

    for k:  x_0, x_1 = the panel's two vectors;  for n < R:  b = broadcast w[n, k];  c_n0 = fma(b, x_0, c_n0);  ...

Weights stay in nn.Linear's layout, as a broadcast does not care where its number lies. A panel of x is [K][P], and what
comes out, [N][P], is again a panel: the hidden state of an expert goes into the second product as it is, and nothing is
summed across lanes. `@lanes_P` walks over any number of rows. The caller blocks k, so that a panel's part (16 KiB) stays
in the first-level cache while rows of weights go past.
"""

from __future__ import annotations

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.row_tiles import WIDE

ARGUMENTS = f"%w: {WIDE}, %row: index, %size: index, %x: memref<?xf32>, %base: index, %c: {WIDE}, %out: index, %column: index"
TYPES = f"{WIDE}, index, index, memref<?xf32>, index, {WIDE}, index, index"


def tile_sizes(vectors: int, tile_rows: int) -> list[int]:
    """Rows of the tiles, largest first, each at most the product of the registers, down to one."""
    largest = tile_rows if vectors == 2 else 2 * tile_rows
    return [rows for rows in (24, 12, 6, 4, 2, 1) if rows <= largest]


def lane_tile(code: Code, lanes: int, vectors: int, rows: int) -> None:
    """Write `@lanes_{vectors * lanes}x{rows}`."""
    kind, panel = f"vector<{lanes}xf32>", vectors * lanes
    with code.function(f"lanes_{panel}x{rows}", ARGUMENTS):
        w_rows = [code.add("%row", n) for n in range(rows)]
        places = [
            f"%c[{code.add('%out', n)}, {code.add('%column', v * lanes)}] : {WIDE}, {kind}"
            for n in range(rows)
            for v in range(vectors)
        ]
        sums = [code.constant(0.0, kind)] * len(places)
        with code.loop(0, "%size", 1, sums, kind) as body:
            at = code.add("%base", code.mul(body.index, panel))
            x = [
                code.let(f"vector.load %x[{code.add(at, v * lanes)}] : memref<?xf32>, {kind}", "x")
                for v in range(vectors)
            ]
            given = []
            for n, row in enumerate(w_rows):
                weight = code.let(f"memref.load %w[{row}, {body.index}] : {WIDE}", "w")
                spread = code.let(f"vector.broadcast {weight} : f32 to {kind}", "b")
                for v in range(vectors):
                    given.append(code.let(f"vector.fma {spread}, {x[v]}, {body.carried[n * vectors + v]} : {kind}", "s"))
            body.give(given)
        for place, total in zip(places, body.results, strict=True):
            before = code.let(f"vector.load {place}")
            code.line(f"vector.store {code.let(f'arith.addf {before}, {total} : {kind}')}, {place}")


def lane_rows(code: Code, lanes: int, vectors: int, tile_rows: int) -> None:
    """Write `@lanes_{vectors * lanes}`: rows `%row` to `%row + %rows`, in the largest tiles that fit."""
    panel = vectors * lanes
    for rows in tile_sizes(vectors, tile_rows):
        lane_tile(code, lanes, vectors, rows)
    with code.function(f"lanes_{panel}", f"{ARGUMENTS}, %rows: index"):
        done = code.index(0)
        for rows in tile_sizes(vectors, tile_rows):
            stop = code.add(done, code.down_to_multiple(code.sub("%rows", done), rows))
            with code.loop(done, stop, rows) as tile:
                row, out = code.add("%row", tile.index), code.add("%out", tile.index)
                code.line(
                    f"func.call @lanes_{panel}x{rows}(%w, {row}, %size, %x, %base, %c, {out}, %column) : ({TYPES}) -> ()"
                )
            done = stop
