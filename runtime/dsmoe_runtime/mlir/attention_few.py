"""Attention for one to three queries of a head, as in decoding: keys and values stream past once, where they lie.

scores [n, C] = q [n, D] . k [C, D]         row tiles: D lies along the lanes, half precision is widened in registers
scores = exp(scores - max)                  along the row, in vectors
answers [n, Dv] = scores [n, C] v [C, Dv]   Dv lies along the lanes, each score is broadcast
y = answers / sum
"""

from __future__ import annotations

from dsmoe_runtime.mlir.attention_place import SLOTS, AttentionSpec, Sizes, masked, query, seen, slots_view
from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.formats import narrow, narrow_scalar, widen, widen_scalar
from dsmoe_runtime.mlir.function import matrix
from dsmoe_runtime.mlir.gather import FLAT
from dsmoe_runtime.mlir.row_tiles import MOST, row_range, store_in_step, store_step, types
from dsmoe_runtime.mlir.vector_math import VectorMath
from dsmoe_runtime.mlir.weights import scratch_matrix

COLUMNS = {1: 8, 2: 4, 3: 4}  # vectors of Dv in registers, by queries


def attend_few(code: Code, spec: AttentionSpec) -> None:
    """Write `@attend_few(batch, head, begin, count, mine, ...)`: `count` queries of a head of keys from `begin` on."""
    lanes = spec.lanes
    for queries in range(1, MOST + 1):
        row_range(code, spec.element, lanes, queries)
        for columns in (COLUMNS[queries], 1):
            _blend(code, spec, queries, columns)
    given = ", ".join(f"{name}: {kind}" for name, kind in spec.handed())
    with code.function(
        "attend_few", f"%batch: index, %head: index, %begin: index, %count: index, %mine: index, {given}"
    ):
        sizes = Sizes(code, spec)
        math, zero = VectorMath(code, lanes), code.constant(0.0, f"vector<{lanes}xf32>")
        packed, scores, answers = (code.add("%mine", at) for at in (sizes.packed, sizes.scores, sizes.answers))
        furthest = _seen_by_all(code, spec, sizes)
        room = code.up_to_multiple(furthest, lanes)
        with code.loop(0, "%count", 1) as n:
            _pack(code, spec, sizes, n.index, code.add(packed, code.mul(n.index, sizes.pitch)))
            row = code.add(scores, code.mul(n.index, sizes.room))
            with code.loop(0, room, lanes) as c:
                code.line(f"vector.store {zero}, %scratch[{code.add(row, c.index)}] : {FLAT}, {math.kind}")
            row = code.add(answers, code.mul(n.index, sizes.out_pitch))
            with code.loop(0, sizes.out_pitch, lanes) as d:
                code.line(f"vector.store {zero}, %scratch[{code.add(row, d.index)}] : {FLAT}, {math.kind}")
        keys = slots_view(code, spec, "%k", ("%batch", "%head", 0), furthest, sizes.depth)
        start = code.index(0)
        out = scratch_matrix(code, "%scratch", sizes.scores, MOST, sizes.room)
        for queries in range(1, MOST + 1):
            with code.when(code.compare("eq", "%count", queries)):
                code.line(
                    f"func.call @rows_{spec.element}_{queries}({keys}, {start}, {sizes.depth}, %scratch, {packed}, "
                    f"{sizes.pitch}, {out}, {start}, {start}, {furthest}) : ({types(spec.element)}, index) -> ()"
                )
        with code.loop(0, "%count", 1) as n:
            head, place = query(code, sizes, "%head", code.add("%begin", n.index))
            row = code.add(scores, code.mul(n.index, sizes.room))
            full, _ = seen(code, spec, sizes, "%batch", head, place)
            masked(code, spec, ("%batch", head, place), (full, furthest), "%scratch", row, 1)
            _softmax(code, math, row, furthest, room, code.add("%mine", code.add(sizes.sums, n.index)))
        for queries in range(1, MOST + 1):
            with code.when(code.compare("eq", "%count", queries)):
                _blend_all(code, spec, sizes, queries, furthest, scores, answers)
        with code.loop(0, "%count", 1) as n:
            head, place = query(code, sizes, "%head", code.add("%begin", n.index))
            _write(code, spec, sizes, math, (head, place), n.index, answers)


def _seen_by_all(code: Code, spec: AttentionSpec, sizes: Sizes) -> str:
    with code.loop(0, "%count", 1, [code.index(0)], "index") as n:
        head, place = query(code, sizes, "%head", code.add("%begin", n.index))
        n.give([code.most(n.carried[0], seen(code, spec, sizes, "%batch", head, place)[1])])
    return n.results[0]


def _pack(code: Code, spec: AttentionSpec, sizes: Sizes, number: str, to: str) -> None:
    """A query times scale, in the order of a row tile, with zeros up to a whole step."""
    lanes, element, kind = spec.lanes, spec.element, spec.tensor
    step, vector = 2 * lanes, f"vector<{lanes}xf32>"
    head, place = query(code, sizes, "%head", code.add("%begin", number))
    scale, one, zero = code.constant(spec.scale, vector), code.constant(spec.scale, "f32"), code.constant(0.0, vector)
    whole = code.down_to_multiple(sizes.depth, step)
    with code.loop(0, whole, step) as d:
        halves = []
        for half in range(2):
            at = f"%q[%batch, {head}, {place}, {code.add(d.index, half * lanes)}] : {kind}, vector<{lanes}x{element}>"
            wide = widen(code, code.let(f"vector.load {at}"), element, lanes)
            halves.append(code.let(f"arith.mulf {wide}, {scale} : {vector}"))
        store_step(code, element, lanes, (halves[0], halves[1]), "%scratch", code.add(to, d.index))
    with code.loop(whole, sizes.depth, step) as d:
        at = code.add(to, d.index)
        store_step(code, element, lanes, (zero, zero), "%scratch", at)
        with code.loop(whole, sizes.depth, 1) as rest:
            value = widen_scalar(code, code.load("%q", f"%batch, {head}, {place}, {rest.index}", kind), element)
            value = code.let(f"arith.mulf {value}, {one} : f32")
            store_in_step(code, element, lanes, value, "%scratch", at, code.sub(rest.index, whole))


def _softmax(code: Code, math: VectorMath, row: str, end: str, room: str, share_at: str) -> None:
    """exp of the row in place, and 1 / sum; from its end to a whole vector the row holds -inf first."""
    infinite = code.let("arith.constant 0xFF800000 : f32", "k")
    with code.loop(end, room, 1) as c:
        code.line(f"memref.store {infinite}, %scratch[{code.add(row, c.index)}] : {FLAT}")
    with code.loop(0, room, math.lanes, [math.spread(infinite)], math.kind) as c:
        value = code.let(f"vector.load %scratch[{code.add(row, c.index)}] : {FLAT}, {math.kind}")
        c.give([math.maximum(c.carried[0], value)])
    top = code.let(f"vector.reduction <maximumf>, {c.results[0]} : {math.kind} into f32")
    nothing = code.let(f"arith.cmpf oeq, {top}, {infinite} : f32")
    zero, one = code.constant(0.0, "f32"), code.constant(1.0, "f32")
    base = math.spread(code.let(f"arith.select {nothing}, {zero}, {top} : f32"))
    with code.loop(0, room, math.lanes, [math.constant(0.0)], math.kind) as c:
        place = f"%scratch[{code.add(row, c.index)}] : {FLAT}, {math.kind}"
        power = math.exp(math.sub(code.let(f"vector.load {place}"), base))
        code.line(f"vector.store {power}, {place}")
        c.give([math.add(c.carried[0], power)])
    total = code.let(f"vector.reduction <add>, {c.results[0]} fastmath<reassoc> : {math.kind} into f32")
    share = code.let(f"arith.divf {one}, {total} : f32")
    share = code.let(f"arith.select {nothing}, {zero}, {share} : f32")
    code.line(f"memref.store {share}, %scratch[{share_at}] : {FLAT}")


def _blend(code: Code, spec: AttentionSpec, queries: int, columns: int) -> None:
    """Write `@blend_{n}x{columns}(v, rows, d, x, pitch, to, to_pitch, scratch)`: to[n, d] += sum_c x[n, c] v[c, d]."""
    lanes, element, view = spec.lanes, spec.element, matrix(spec.element)
    kind = f"vector<{lanes}xf32>"
    arguments = (
        f"%v: {view}, %rows: index, %d: index, %x: index, %pitch: index, %to: index, %to_pitch: index, %scratch: {FLAT}"
    )
    with code.function(f"blend_{queries}x{columns}", arguments):
        places = [
            [code.add(code.add("%to", code.mul("%to_pitch", n)), code.add("%d", m * lanes)) for m in range(columns)]
            for n in range(queries)
        ]
        before = [code.let(f"vector.load %scratch[{at}] : {FLAT}, {kind}") for row in places for at in row]
        with code.loop(0, "%rows", 1, before, kind) as c:
            sums = list(c.carried)
            ahead = code.add(c.index, 8)
            for m in range(0, columns, 64 // (lanes * (4 if element == "f32" else 2))):
                at = f"%v[{ahead}, {code.add('%d', m * lanes)}]"
                code.line(f"memref.prefetch {at}, read, locality<3>, data : {view}")
            spread = []
            for n in range(queries):
                at = code.add(code.add("%x", code.mul("%pitch", n)), c.index)
                spread.append(code.let(f"vector.broadcast {code.load('%scratch', at, FLAT)} : f32 to {kind}"))
            for m in range(columns):
                at = f"%v[{c.index}, {code.add('%d', m * lanes)}] : {view}, vector<{lanes}x{element}>"
                value = widen(code, code.let(f"vector.load {at}"), element, lanes)
                for n in range(queries):
                    place = n * columns + m
                    sums[place] = code.let(f"vector.fma {spread[n]}, {value}, {sums[place]} : {kind}")
            c.give(sums)
        for value, at in zip(c.results, (at for row in places for at in row), strict=True):
            code.line(f"vector.store {value}, %scratch[{at}] : {FLAT}, {kind}")


def _blend_all(
    code: Code, spec: AttentionSpec, sizes: Sizes, queries: int, end: str, scores: str, answers: str
) -> None:
    """answers += scores v, a block of slots at a time, so that values come from memory once."""
    lanes, element, view = spec.lanes, spec.element, matrix(spec.element)
    with code.loop(0, end, SLOTS) as block:
        rows = code.least(code.sub(end, block.index), SLOTS)
        values = slots_view(code, spec, "%v", ("%batch", "%head", block.index), rows, sizes.width)
        x = code.add(scores, block.index)
        begin = code.index(0)
        for columns in (COLUMNS[queries], 1):
            whole = code.down_to_multiple(sizes.width, columns * lanes)
            with code.loop(begin, whole, columns * lanes) as d:
                code.line(
                    f"func.call @blend_{queries}x{columns}({values}, {rows}, {d.index}, {x}, {sizes.room}, {answers}, "
                    f"{sizes.out_pitch}, %scratch) : ({view}, index, index, index, index, index, index, {FLAT}) -> ()"
                )
            begin = whole
        with code.loop(begin, sizes.width, 1) as d, code.loop(0, queries, 1) as n:
            at = code.add(code.add(answers, code.mul(n.index, sizes.out_pitch)), d.index)
            with code.loop(0, rows, 1, [code.load("%scratch", at, FLAT)], "f32") as c:
                value = widen_scalar(code, code.load(values, f"{c.index}, {d.index}", view), element)
                score = code.load("%scratch", code.add(code.add(x, code.mul(n.index, sizes.room)), c.index), FLAT)
                c.give([code.let(f"math.fma {score}, {value}, {c.carried[0]} : f32")])
            code.line(f"memref.store {c.results[0]}, %scratch[{at}] : {FLAT}")


def _write(
    code: Code, spec: AttentionSpec, sizes: Sizes, math: VectorMath, at: tuple[str, str], number: str, answers: str
) -> None:
    """y = answers / sum, rounded once."""
    kind, element, lanes = spec.tensor, spec.element, spec.lanes
    share = code.load("%scratch", code.add("%mine", code.add(sizes.sums, number)), FLAT)
    row = code.add(answers, code.mul(number, sizes.out_pitch))
    whole = code.down_to_multiple(sizes.width, lanes)
    with code.loop(0, whole, lanes) as d:
        value = code.let(f"vector.load %scratch[{code.add(row, d.index)}] : {FLAT}, {math.kind}")
        value = narrow(code, math.mul(value, math.spread(share)), element, lanes)
        code.line(f"vector.store {value}, %y[%batch, {at[0]}, {at[1]}, {d.index}] : {kind}, vector<{lanes}x{element}>")
    with code.loop(whole, sizes.width, 1) as d:
        value = code.let(f"arith.mulf {code.load('%scratch', code.add(row, d.index), FLAT)}, {share} : f32")
        where = f"%y[%batch, {at[0]}, {at[1]}, {d.index}] : {kind}"
        code.line(f"memref.store {narrow_scalar(code, value, element)}, {where}")
