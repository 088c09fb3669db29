"""Register tiles for many tokens: tokens lie along the lanes, and each weight is broadcast once for 2 L of them.

`@lanes_PxR`: c[n, p] += sum_k w[n, k] x[k, p] for R rows of weights and a panel of P tokens, P = L or 2 L:

    for k:  x_0, x_1 = the panel's two vectors;  for n < R:  b = broadcast w[n, k];  c_n0 = fma(b, x_0, c_n0);  ...

Weights stay in nn.Linear's layout, as a broadcast does not care where its number lies.
A panel of x is [K][P], and what comes out, [N][P], is again a panel: the hidden state of an expert goes into the second
product as it is, and nothing is summed across lanes. `@lanes_P` walks over any number of rows. The caller blocks k, so
that a panel's part (12 KiB) stays in the first-level cache while rows of weights go past.
"""

from __future__ import annotations

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.row_tiles import WIDE

ARGUMENTS = (
    f"%w: {WIDE}, %row: index, %size: index, %x: memref<?xf32>, %base: index, %c: {WIDE}, %out: index, %column: index, "
    "%ahead: index"
)
TYPES = f"{WIDE}, index, index, memref<?xf32>, index, {WIDE}, index, index, index"
LINE = 16  # float32s of a cache line: so often the weights that come next are asked for


def tile_sizes(vectors: int, tile_rows: int) -> list[int]:
    """Rows of the tiles, largest first, down to one."""
    return [rows for rows in (12, 6, 3, 2, 1) if rows <= tile_rows]


def lane_tile(code: Code, lanes: int, vectors: int, rows: int, name: str) -> None:
    """Write `@{name}_{vectors * lanes}x{rows}`; with one vector, even and odd k are summed apart.

    "lanes" reads weights as [N, K], "turned" as [K, N].
    """

    def place(row: str, k: str) -> str:
        return f"{row}, {k}" if name == "lanes" else f"{k}, {row}"

    kind, panel, chains = f"vector<{lanes}xf32>", vectors * lanes, 3 - vectors
    with code.function(f"{name}_{panel}x{rows}", ARGUMENTS):
        w_rows = [code.add("%row", n) for n in range(rows)]
        whole = code.down_to_multiple("%size", LINE)

        def step(k: str, sums: list[str], first: int) -> list[str]:
            sums = list(sums)
            start = code.add("%base", code.mul(k, panel))
            x = [
                code.let(f"vector.load %x[{code.add(start, v * lanes)}] : memref<?xf32>, {kind}", "x")
                for v in range(vectors)
            ]
            for n, row in enumerate(w_rows):
                weight = code.let(f"memref.load %w[{place(row, k)}] : {WIDE}", "w")
                spread = code.let(f"vector.broadcast {weight} : f32 to {kind}", "b")
                for v in range(vectors):
                    at = (first * rows + n) * vectors + v
                    sums[at] = code.let(f"vector.fma {spread}, {x[v]}, {sums[at]} : {kind}", "s")
            return sums

        zero = code.constant(0.0, kind)
        with code.loop(0, whole, LINE, [zero] * (rows * vectors * chains), kind) as lines:
            ahead = code.add(lines.index, "%ahead")
            for row in w_rows if name == "lanes" else w_rows[:1]:
                code.line(f"memref.prefetch %w[{place(row, ahead)}], read, locality<2>, data : {WIDE}")
            with code.loop(lines.index, code.add(lines.index, LINE), chains, lines.carried, kind) as body:
                sums = body.carried
                for chain in range(chains):
                    sums = step(code.add(body.index, chain), sums, chain)
                body.give(sums)
            lines.give(body.results)
        with code.loop(whole, "%size", 1, lines.results, kind) as rest:
            rest.give(step(rest.index, rest.carried, 0))
        for n in range(rows):
            for v in range(vectors):
                total = rest.results[n * vectors + v]
                if chains == 2:
                    total = code.let(f"arith.addf {total}, {rest.results[(rows + n) * vectors + v]} : {kind}")
                where = f"%c[{code.add('%out', n)}, {code.add('%column', v * lanes)}] : {WIDE}, {kind}"
                before = code.let(f"vector.load {where}")
                code.line(f"vector.store {code.let(f'arith.addf {before}, {total} : {kind}')}, {where}")


def lane_rows(code: Code, lanes: int, vectors: int, tile_rows: int, name: str = "lanes") -> None:
    """Write `@{name}_{vectors * lanes}`: rows `%row` to `%row + %rows`, in the largest tiles that fit."""
    panel = vectors * lanes
    if f"{name}_{panel}" in code.functions:
        return
    for rows in tile_sizes(vectors, tile_rows):
        lane_tile(code, lanes, vectors, rows, name)
    with code.function(f"{name}_{panel}", f"{ARGUMENTS}, %rows: index"):
        done = code.index(0)
        for rows in tile_sizes(vectors, tile_rows):
            stop = code.add(done, code.down_to_multiple(code.sub("%rows", done), rows))
            with code.loop(done, stop, rows) as tile:
                row, out = code.add("%row", tile.index), code.add("%out", tile.index)
                code.line(
                    f"func.call @{name}_{panel}x{rows}(%w, {row}, %size, %x, %base, %c, {out}, %column, %ahead) : "
                    f"({TYPES}) -> ()"
                )
            done = stop
