"""Register tiles for few tokens: K lies along the lanes, weights stream from memory in the layout that nn.Linear has.

`@rows_MxN`: out[m, n] += sum_k x[m, k] w[n, k] for M rows of x and N rows of weights. A step takes 2 L values of k:

    for k = 0 to K step 2L:  w_n = 2 vectors of row n;  x_m = 2 vectors of row m;  acc_mn = fma(w_n, x_m, acc_mn)
    out[m, n] += the lanes of acc_mn

No weight is packed or copied. Rows of x end with zeros up to a multiple of 2 L; of weights the last, partial step is
copied to the stack and padded there, so that nothing beyond a row is read. bfloat16 is widened in registers, even and odd
values apart, and rows of x are stored in that order (`store_row`): the sum over k does not mind.
"""

from __future__ import annotations

from dsmoe_runtime.mlir.code import Code, Value
from dsmoe_runtime.mlir.formats import pairs, widen, widen_scalar

MATRIX = "memref<?x?x{}, strided<[?, 1], offset: ?>>"
WIDE = MATRIX.format("f32")
MOST = 3  # tokens of a tile: 3 x 4 sums, 3 of x and 1 of weights are the 16 registers of AVX2
WEIGHT_ROWS = 4
PREFETCH = 512  # bytes ahead of each row


def split_pairs(element: str) -> bool:
    """Whether rows of x are stored with even and odd values apart."""
    return element == "bf16"


def row_tile(code: Code, element: str, lanes: int, tokens: int, rows: int) -> None:
    """Write `@rows_{tokens}x{rows}`."""
    matrix, kind, step = MATRIX.format(element), f"vector<{lanes}xf32>", 2 * lanes
    arguments = (
        f"%w: {matrix}, %row: index, %size: index, %x: memref<?xf32>, %base: index, %pitch: index, "
        f"%out: {WIDE}, %token: index, %column: index"
    )
    chains = 2 if tokens * rows < 8 else 1  # eight sums in flight hide the latency of a product
    with code.function(f"rows_{tokens}x{rows}", arguments):
        w_rows = [code.add("%row", n) for n in range(rows)]
        x_bases = [code.add("%base", code.mul("%pitch", m)) for m in range(tokens)]
        zero = code.constant(0.0, kind)
        edge = code.down_to_multiple("%size", step)

        def step_of(weights: list[tuple[str, str]], k: str, sums: list[str]) -> list[str]:
            sums = list(sums)
            for half in range(2):
                for m, base in enumerate(x_bases):
                    where = code.add(code.add(base, k), half * lanes)
                    x = code.let(f"vector.load %x[{where}] : memref<?xf32>, {kind}", "x")
                    for n in range(rows):
                        at = (m * rows + n) * chains + half % chains
                        sums[at] = code.let(f"vector.fma {weights[n][half]}, {x}, {sums[at]} : {kind}", "s")
            return sums

        with code.loop(0, edge, step, [zero] * (tokens * rows * chains), kind) as body:
            loaded = [_load(code, element, lanes, row, body.index) for row in w_rows]
            body.give(step_of(loaded, body.index, body.carried))
        buffer = f"memref<{rows * step}xf32>"
        with code.loop(edge, "%size", step, body.results, kind) as rest:
            tail = code.let(f"memref.alloca() : {buffer}")
            padded = []
            for n, row in enumerate(w_rows):
                for half in range(2):
                    code.line(f"vector.store {zero}, {tail}[{code.index(n * step + half * lanes)}] : {buffer}, {kind}")
                with code.loop(edge, "%size", 1) as one:
                    value = code.let(f"memref.load %w[{row}, {one.index}] : {matrix}")
                    position = place_in_step(code, code.sub(one.index, edge), element, lanes)
                    wide = widen_scalar(code, value, element)
                    code.line(f"memref.store {wide}, {tail}[{code.add(position, n * step)}] : {buffer}")
            for n in range(rows):
                halves = [
                    code.let(f"vector.load {tail}[{code.index(n * step + half * lanes)}] : {buffer}, {kind}")
                    for half in range(2)
                ]
                padded.append((halves[0], halves[1]))
            rest.give(step_of(padded, edge, rest.carried))
        for m in range(tokens):
            for n in range(rows):
                at = (m * rows + n) * chains
                total = rest.results[at]
                if chains == 2:
                    total = code.let(f"arith.addf {total}, {rest.results[at + 1]} : {kind}")
                value = code.let(f"vector.reduction <add>, {total} fastmath<reassoc> : {kind} into f32")
                where = f"%out[{code.add('%token', m)}, {code.add('%column', n)}] : {WIDE}"
                before = code.let(f"memref.load {where}")
                code.line(f"memref.store {code.let(f'arith.addf {before}, {value} : f32')}, {where}")


def _load(code: Code, element: str, lanes: int, row: str, k: str) -> tuple[str, str]:
    """Two vectors of float32 from 2 L stored weights: in order, or the even and the odd ones."""
    matrix = MATRIX.format(element)
    if split_pairs(element):
        stored = f"vector<{2 * lanes}x{element}>"
        return pairs(code, code.let(f"vector.load %w[{row}, {k}] : {matrix}, {stored}", "w"), lanes)
    halves = []
    for half in range(2):
        at = code.add(k, half * lanes)
        raw = code.let(f"vector.load %w[{row}, {at}] : {matrix}, vector<{lanes}x{element}>", "w")
        halves.append(widen(code, raw, element, lanes))
    return halves[0], halves[1]


def place_in_step(code: Code, k: Value, element: str, lanes: int) -> str:
    """Where value k of a step of 2 L lies in a stored row of x."""
    if not split_pairs(element):
        return code.index(k)
    return code.add(code.mul(code.rem(k, 2), lanes), code.div(k, 2))


def store_step(code: Code, element: str, lanes: int, halves: tuple[str, str], buffer: str, at: str) -> None:
    """Store 2 L consecutive values of k, given as two vectors in order, where a tile will read them."""
    kind, first, second = f"vector<{lanes}xf32>", *halves
    if split_pairs(element):
        evens = ", ".join(str(2 * n) for n in range(lanes))
        odds = ", ".join(str(2 * n + 1) for n in range(lanes))
        first, second = (
            code.let(f"vector.shuffle {halves[0]}, {halves[1]} [{order}] : {kind}, {kind}") for order in (evens, odds)
        )
    code.line(f"vector.store {first}, {buffer}[{at}] : memref<?xf32>, {kind}")
    code.line(f"vector.store {second}, {buffer}[{code.add(at, lanes)}] : memref<?xf32>, {kind}")
