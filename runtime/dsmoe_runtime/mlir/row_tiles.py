"""Register tiles for few tokens: K lies along the lanes, weights stream from memory in the layout that nn.Linear has.

`@rows_{element}_MxN`: out[m, n] += sum_k x[m, k] w[n, k] for M rows of x and N of weights. A step takes 2 L of k:

    for k = 0 to K step 2L:  w_n = 2 vectors of row n;  x_m = 2 vectors of row m;  acc_mn = fma(w_n, x_m, acc_mn)
    out[m, n] += the lanes of acc_mn

No weight is packed or copied. Rows of x end with zeros up to a multiple of 2 L; of weights the last, partial step is
copied to the stack and padded there, so that nothing beyond a row is read. bfloat16 is widened in registers, even and
odd values apart, and rows of x are stored in that order (`store_step`): the sum over k does not mind.
"""

from __future__ import annotations

from collections.abc import Callable

from dsmoe_runtime.mlir.code import Code, Value
from dsmoe_runtime.mlir.formats import every_second, narrow, narrow_scalar, widen, widen_scalar

MATRIX = "memref<?x?x{}, strided<[?, 1], offset: ?>>"
WIDE = MATRIX.format("f32")
MOST = 3  # tokens of a tile: 3 x 4 sums, 3 of x and 1 of weights are the 16 registers of AVX2


def weight_rows(element: str, tokens: int) -> int:
    """Rows of weights of a tile. bfloat16 pairs stay in a register for both halves of a step, which costs a row; one
    token of float32 is all reading, and six streams read faster than four."""
    if tokens == 1 and element == "f32":
        return 6
    return 3 if split_pairs(element) and tokens == MOST else 4


def split_pairs(element: str) -> bool:
    """Whether rows of x are stored with even and odd values apart."""
    return element == "bf16"


def row_tile(code: Code, element: str, lanes: int, tokens: int, rows: int) -> None:
    """Write `@rows_{element}_{tokens}x{rows}`."""
    matrix, kind, step = MATRIX.format(element), f"vector<{lanes}xf32>", 2 * lanes
    pairs, stored = code.dot and split_pairs(element), f"vector<{step}x{element}>"
    chains = 2 if tokens * rows < 8 else 1  # eight sums in flight hide the latency of a product
    ahead = rows * (2 if tokens == 1 and element != "f32" else 1)  # short rows: one tile is read before memory answers
    with code.function(f"rows_{element}_{tokens}x{rows}", arguments(element)):
        w_rows = [code.add("%row", n) for n in range(rows)]
        x_bases = [code.add("%base", code.mul("%pitch", m)) for m in range(tokens)]
        zero = code.constant(0.0, kind)
        edge = code.down_to_multiple("%size", step)

        def step_of(weight: Callable[[int, int], str], k: str, sums: list[str], number: int) -> list[str]:
            # The order is that of few registers: x of all tokens, then each weight right before its products.
            sums = list(sums)
            for half in range(1 if pairs else 2):
                places = [code.add(code.add(base, k), half * lanes) for base in x_bases]
                x = [code.let(f"vector.load %x[{place}] : memref<?xf32>, {kind}", "x") for place in places]
                if pairs:
                    x = [code.let(f"vector.bitcast {value} : {kind} to {stored}", "x") for value in x]
                for n in range(rows):
                    w = weight(n, half)
                    for m in range(tokens):
                        at = (m * rows + n) * chains + (number if pairs else half) % chains
                        if pairs:
                            dot = f"x86.avx512.dot {sums[at]}, {w}, {x[m]} : {stored} -> {kind}"
                        else:
                            dot = f"vector.fma {w}, {x[m]}, {sums[at]} : {kind}"
                        sums[at] = code.let(dot, "s")
            return sums

        def steps(start: Value, stop: str, count: int, sums: list[str]) -> list[str]:
            with code.loop(start, stop, count * step, sums, kind) as body:
                for row in w_rows:  # the rows that come next: memory works while this tile computes
                    place = f"%w[{code.add(row, ahead)}, {body.index}]"
                    code.line(f"memref.prefetch {place}, read, locality<2>, data : {matrix}")
                sums = body.carried
                for number in range(count):
                    k = code.add(body.index, number * step)
                    sums = step_of(_reader(code, element, lanes, w_rows, k), k, sums, number)
                body.give(sums)
            return body.results

        # Half precision fills a line of the cache with two steps, and a line is asked for once. With more tokens there
        # are no registers for two steps: three tokens took 1.6 times as long.
        sums, start = [zero] * (tokens * rows * chains), code.index(0)
        if tokens == 1 and element != "f32":
            lines = code.down_to_multiple("%size", 2 * step)
            sums, start = steps(start, lines, 2, sums), lines
        sums = steps(start, edge, 1, sums)
        with code.loop(edge, "%size", step, sums, kind) as rest:
            padded = _padded(code, element, lanes, w_rows, edge)
            rest.give(step_of(padded, edge, rest.carried, 0))
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


def _padded(code: Code, element: str, lanes: int, w_rows: list[str], edge: str) -> Callable[[int, int], str]:
    """What loads half of the last, partial step, from a copy on the stack that ends with zeros."""
    step, matrix, pairs = 2 * lanes, MATRIX.format(element), code.dot and split_pairs(element)
    of, width = (element, step) if pairs else ("f32", lanes)
    buffer, kind = f"memref<{len(w_rows) * step}x{of}>", f"vector<{width}x{of}>"
    tail = code.let(f"memref.alloca() : {buffer}")
    zero = code.let(f"arith.constant dense<0.0> : {kind}", "k")
    for n, row in enumerate(w_rows):
        for at in range(0, step, width):
            code.line(f"vector.store {zero}, {tail}[{code.index(n * step + at)}] : {buffer}, {kind}")
        with code.loop(edge, "%size", 1) as one:
            value = code.let(f"memref.load %w[{row}, {one.index}] : {matrix}")
            position = code.sub(one.index, edge)
            if not pairs:
                position = place_in_step(code, position, element, lanes)
                value = widen_scalar(code, value, element)
            code.line(f"memref.store {value}, {tail}[{code.add(position, n * step)}] : {buffer}")

    def load(n: int, half: int) -> str:
        return code.let(f"vector.load {tail}[{code.index(n * step + half * lanes)}] : {buffer}, {kind}")

    return load


def _reader(code: Code, element: str, lanes: int, w_rows: list[str], k: str) -> Callable[[int, int], str]:
    """What loads half of a step of a row of weights as float32: in order, or its even and its odd values."""
    matrix, stored = MATRIX.format(element), f"vector<{2 * lanes}x{element}>"
    raw: dict[int, str] = {}

    def in_order(n: int, half: int) -> str:
        at = code.add(k, half * lanes)
        value = code.let(f"vector.load %w[{w_rows[n]}, {at}] : {matrix}, vector<{lanes}x{element}>", "w")
        return widen(code, value, element, lanes)

    def evens_and_odds(n: int, half: int) -> str:
        if half == 0:
            raw[n] = code.let(f"vector.load %w[{w_rows[n]}, {k}] : {matrix}, {stored}", "w")
        return every_second(code, raw[n], lanes, half)

    def in_pairs(n: int, half: int) -> str:
        return code.let(f"vector.load %w[{w_rows[n]}, {k}] : {matrix}, {stored}", "w")

    if split_pairs(element):
        return in_pairs if code.dot else evens_and_odds
    return in_order


def row_range(code: Code, element: str, lanes: int, tokens: int) -> None:
    """Write `@rows_{element}_{tokens}`: rows `%row` to `%stop` of the weights, in tiles, and the tiles themselves."""
    height = weight_rows(element, tokens)
    if f"rows_{element}_{tokens}" in code.functions:
        return
    for rows in (1, height):
        row_tile(code, element, lanes, tokens, rows)
    with code.function(f"rows_{element}_{tokens}", f"{arguments(element)}, %stop: index"):
        whole = code.add("%row", code.down_to_multiple(code.sub("%stop", "%row"), height))
        for start, stop, rows in (("%row", whole, height), (whole, "%stop", 1)):
            with code.loop(start, stop, rows) as n:
                column = code.add("%column", code.sub(n.index, "%row"))
                code.line(
                    f"func.call @rows_{element}_{tokens}x{rows}(%w, {n.index}, %size, %x, %base, %pitch, %out, %token, "
                    f"{column}) : ({types(element)}) -> ()"
                )


def arguments(element: str) -> str:
    """Of a row tile."""
    return (
        f"%w: {MATRIX.format(element)}, %row: index, %size: index, %x: memref<?xf32>, %base: index, %pitch: index, "
        f"%out: {WIDE}, %token: index, %column: index"
    )


def types(element: str) -> str:
    """Theirs."""
    return f"{MATRIX.format(element)}, index, index, memref<?xf32>, index, index, {WIDE}, index, index"


def place_in_step(code: Code, k: Value, element: str, lanes: int) -> str:
    """Where value k of a step of 2 L lies in a stored row of x."""
    if not split_pairs(element):
        return code.index(k)
    return code.add(code.mul(code.rem(k, 2), lanes), code.div(k, 2))


def store_in_step(code: Code, element: str, lanes: int, value: str, buffer: str, at: str, k: str) -> None:
    """Store one float32 as value `k` of a step that begins at `at` and holds zeros so far."""
    kind = "memref<?xf32>"
    if not (code.dot and split_pairs(element)):
        code.line(f"memref.store {value}, {buffer}[{code.add(at, place_in_step(code, k, element, lanes))}] : {kind}")
        return
    where = f"{buffer}[{code.add(at, code.div(k, 2))}] : {kind}"
    half = code.let(f"arith.bitcast {narrow_scalar(code, value, element)} : bf16 to i16")
    word = code.let(f"arith.extui {half} : i16 to i32")
    shift = code.let(f"arith.index_cast {code.mul(code.rem(k, 2), 16)} : index to i32")
    before = code.let(f"arith.bitcast {code.let(f'memref.load {where}')} : f32 to i32")
    joint = code.let(f"arith.ori {before}, {code.let(f'arith.shli {word}, {shift} : i32')} : i32")
    code.line(f"memref.store {code.let(f'arith.bitcast {joint} : i32 to f32')}, {where}")


def store_step(code: Code, element: str, lanes: int, halves: tuple[str, str], buffer: str, at: str) -> None:
    """Store 2 L consecutive values of k, given as two vectors in order, where a tile will read them."""
    kind, first, second = f"vector<{lanes}xf32>", *halves
    if split_pairs(element) and code.dot:  # as bfloat16, in half of the room
        parts = [narrow(code, half, element, lanes) for half in halves]
        order, stored = list(range(2 * lanes)), f"vector<{lanes}x{element}>"
        joint = code.let(f"vector.shuffle {parts[0]}, {parts[1]} {order} : {stored}, {stored}")
        words = code.let(f"vector.bitcast {joint} : vector<{2 * lanes}x{element}> to {kind}")
        code.line(f"vector.store {words}, {buffer}[{at}] : memref<?xf32>, {kind}")
        return
    if split_pairs(element):
        evens = ", ".join(str(2 * n) for n in range(lanes))
        odds = ", ".join(str(2 * n + 1) for n in range(lanes))
        first, second = (
            code.let(f"vector.shuffle {halves[0]}, {halves[1]} [{order}] : {kind}, {kind}") for order in (evens, odds)
        )
    code.line(f"vector.store {first}, {buffer}[{at}] : memref<?xf32>, {kind}")
    code.line(f"vector.store {second}, {buffer}[{code.add(at, lanes)}] : memref<?xf32>, {kind}")
