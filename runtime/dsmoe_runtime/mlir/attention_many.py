"""Attention for many queries of a head: they lie along the lanes, so softmax and both products need no sum across them.

    scores [C, P] = k [C, D] . q [D, P]         lane tiles: keys are the weights, queries the tokens
    scores = exp(scores - max over C)           down the columns, in vectors
    answers [Dv, P] = v^T [Dv, C] . scores      lane tiles again: values as weights, read the other way round
    y[query, :] = answers[:, query] / sum       transposed on its way out

A panel of P = 2 L or L queries goes through the slots that any of them sees; up to four panels share a block of keys.
Lanes beyond the last query repeat it, and write the same numbers to the same place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from dsmoe_runtime.mlir.attention_place import PANELS, AttentionSpec, Sizes, blocks, masked, query, seen
from dsmoe_runtime.mlir.code import Code, Value
from dsmoe_runtime.mlir.formats import narrow, narrow_scalar, widen, widen_scalar
from dsmoe_runtime.mlir.gather import FLAT
from dsmoe_runtime.mlir.lane_tiles import TYPES, lane_rows
from dsmoe_runtime.mlir.row_tiles import WIDE
from dsmoe_runtime.mlir.transpose import EIGHT, SIDE, transpose
from dsmoe_runtime.mlir.vector_math import VectorMath
from dsmoe_runtime.mlir.weights import Stack, scratch_matrix, unpack

DEPTH = 64  # of the sums that a score is made of
UNROLLED = 4  # slots at once in the passes over scores


def attend_many(code: Code, spec: AttentionSpec) -> None:
    """Write `@attend_many(batch, head, begin, count, mine, ...)`: `count` queries of a head of keys from `begin` on."""
    lanes, stack = spec.lanes, Stack(spec.element, False)
    for vectors in (1, 2):
        for name in ("lanes", "turned"):
            lane_rows(code, lanes, vectors, spec.level.tile_rows, name)
    unpack(code, stack, lanes)
    for helper in (_pack, _softmax, _write):
        helper(code, spec)
    given = ", ".join(f"{name}: {kind}" for name, kind in spec.handed())
    with code.function(
        "attend_many", f"%batch: index, %head: index, %begin: index, %count: index, %mine: index, {given}"
    ):
        sizes, step = Sizes(code, spec), 2 * lanes
        head = ("%batch", "%head")
        panels = code.div_up("%count", step)
        ends = code.let(f"memref.alloca() : memref<{PANELS}xindex>")
        call, zero = _caller(code, spec), code.index(0)
        with code.loop(0, panels, 1, [zero], "index") as panel:
            _, end = _seen_by_panel(code, spec, sizes, panel.index)
            code.line(f"memref.store {end}, {ends}[{panel.index}] : memref<{PANELS}xindex>")
            panel.give([code.most(panel.carried[0], end)])
        furthest = panel.results[0]
        each = functools.partial(_each, code, sizes, panels, lanes)
        with each() as (panel_at, first, width, _):
            call("pack", first, width, code.add("%mine", code.add(sizes.packed, code.mul(panel_at, sizes.pitch))))
            _fill_zero(code, lanes, code.add(sizes.scores, code.mul(panel_at, sizes.room)), code.mul(furthest, width))
            _fill_zero(
                code, lanes, code.add(sizes.answers, code.mul(panel_at, sizes.out_pitch)), code.mul(sizes.width, width)
            )
        keys_of = blocks(code, spec, sizes, "%k", head, furthest, sizes.depth, stack.unpack)
        with keys_of as (start, rows, keys), each() as (panel_at, _, width, number):
            end = code.load(ends, number, f"memref<{PANELS}xindex>")
            with code.when(code.compare("ult", start, end)):
                base = code.add("%mine", code.add(sizes.packed, code.mul(panel_at, sizes.pitch)))
                scores = code.add(sizes.scores, code.mul(panel_at, sizes.room))
                target = scratch_matrix(code, "%scratch", scores, sizes.room, width)
                with code.loop(0, sizes.depth, DEPTH) as d:  # short sums, added up: a score's error is its exp's
                    size = code.least(code.sub(sizes.depth, d.index), DEPTH)
                    at = code.add(base, code.mul(d.index, width))
                    view = f"memref.subview {keys}[0, {d.index}] [{rows}, {size}] [1, 1] : {WIDE} to {WIDE}"
                    _product(code, "lanes", lanes, width, code.let(view), size, at, (target, start), rows)
        with each() as (panel_at, first, width, number):
            full, end = _seen_by_panel(code, spec, sizes, number)
            scores = code.add("%mine", code.add(sizes.scores, code.mul(panel_at, sizes.room)))
            sums = code.add("%mine", code.add(sizes.sums, panel_at))
            call("softmax", first, width, scores, full, end, sums)
        values_of = blocks(code, spec, sizes, "%v", head, furthest, sizes.width, stack.unpack)
        with values_of as (start, rows, values), each() as (panel_at, _, width, number):
            end = code.load(ends, number, f"memref<{PANELS}xindex>")
            with code.when(code.compare("ult", start, end)):
                scores = code.add("%mine", code.add(sizes.scores, code.mul(panel_at, sizes.room)))
                base = code.add(scores, code.mul(start, width))
                answers = code.add(sizes.answers, code.mul(panel_at, sizes.out_pitch))
                target = scratch_matrix(code, "%scratch", answers, sizes.out_pitch, width)
                depth = code.least(rows, code.sub(end, start))
                _product(code, "turned", lanes, width, values, depth, base, (target, zero), sizes.width)
        with each() as (panel_at, first, width, _):
            answers = code.add("%mine", code.add(sizes.answers, code.mul(panel_at, sizes.out_pitch)))
            call("write", first, width, answers, code.add("%mine", code.add(sizes.sums, panel_at)))


@contextmanager
def _each(code: Code, sizes: Sizes, panels: str, lanes: int) -> Iterator[tuple[str, str, str, str]]:
    """Panels: lanes before it, its first query of the head, its width, its number."""
    step = 2 * lanes
    with code.loop(0, panels, 1) as panel:
        before = code.mul(panel.index, step)
        left = code.sub("%count", before)
        yield (
            before,
            code.add("%begin", before),
            code.select(code.compare("ule", left, lanes), lanes, step),
            panel.index,
        )


def _seen_by_panel(code: Code, spec: AttentionSpec, sizes: Sizes, panel: str) -> tuple[str, str]:
    """Up to where all of its queries see everything, and the end of what any of them sees."""
    if spec.mask == "none":
        return sizes.slots, sizes.slots
    first = code.mul(panel, 2 * spec.lanes)
    stop = code.least(code.add(first, 2 * spec.lanes), "%count")
    with code.loop(first, stop, 1, [sizes.slots, code.index(0)], "index") as lane:
        head, place = query(code, sizes, "%head", code.add("%begin", lane.index))
        full, end = seen(code, spec, sizes, "%batch", head, place)
        lane.give([code.least(lane.carried[0], full), code.most(lane.carried[1], end)])
    return lane.results[0], lane.results[1]


def _caller(code: Code, spec: AttentionSpec) -> Callable[..., None]:
    """What calls a part with what both were handed, and more indices."""
    names, kinds = (", ".join(part) for part in zip(*spec.handed(), strict=True))

    def call(name: str, *values: str) -> None:
        own = ["%batch", "%head", "%begin", "%count", *values]
        code.line(f"func.call @{name}({', '.join(own)}, {names}) : ({', '.join(['index'] * len(own))}, {kinds}) -> ()")

    return call


def _part(code: Code, spec: AttentionSpec, name: str, *values: str) -> AbstractContextManager[None]:
    """Write such a part."""
    own = ", ".join(f"%{value}: index" for value in ("batch", "head", "begin", "count", *values))
    return code.function(name, f"{own}, {', '.join(f'{n}: {kind}' for n, kind in spec.handed())}")


def _fill_zero(code: Code, lanes: int, start: str, count: str) -> None:
    zero = code.constant(0.0, f"vector<{lanes}xf32>")
    base = code.add("%mine", start)
    with code.loop(0, count, lanes) as at:
        code.line(f"vector.store {zero}, %scratch[{code.add(base, at.index)}] : {FLAT}, vector<{lanes}xf32>")


def _product(
    code: Code, name: str, lanes: int, width: str, w: str, size: str, base: str, out: tuple[str, str], rows: str
) -> None:
    zero, ahead = code.index(0), code.index(0 if name == "lanes" else 16)
    for vectors in (1, 2):
        with code.when(code.compare("eq", width, vectors * lanes)):
            code.line(
                f"func.call @{name}_{vectors * lanes}({w}, {zero}, {size}, %scratch, {base}, {out[0]}, {out[1]}, "
                f"{zero}, {ahead}, {rows}) : ({TYPES}, index) -> ()"
            )


def _lane_queries(code: Code, sizes: Sizes, first: str, start: str) -> list[tuple[str, str]]:
    """Head and place of eight lanes; beyond the last query it is the last."""
    last = code.sub(code.add("%begin", "%count"), 1)
    numbers = [code.least(code.add(code.add(first, start), lane), last) for lane in range(SIDE)]
    return [query(code, sizes, "%head", number) for number in numbers]


def _pack(code: Code, spec: AttentionSpec) -> None:
    """Write `@pack(.., first, width, to)`: queries times scale as a panel [D, P]."""
    kind, element = spec.tensor, spec.element
    with _part(code, spec, "pack", "first", "width", "to"):
        sizes = Sizes(code, spec)
        scale, one = code.constant(spec.scale, EIGHT), code.constant(spec.scale, "f32")
        whole = code.down_to_multiple(sizes.depth, SIDE)
        with code.loop(0, "%width", SIDE) as group:
            rows = _lane_queries(code, sizes, "%first", group.index)
            base = code.add("%to", group.index)
            with code.loop(0, whole, SIDE) as d:
                loaded = []
                for head, place in rows:
                    at = f"%q[%batch, {head}, {place}, {d.index}] : {kind}, vector<{SIDE}x{element}>"
                    wide = widen(code, code.let(f"vector.load {at}"), element, SIDE)
                    loaded.append(code.let(f"arith.mulf {wide}, {scale} : {EIGHT}"))
                for n, column in enumerate(transpose(code, loaded)):
                    to = code.add(base, code.mul(code.add(d.index, n), "%width"))
                    code.line(f"vector.store {column}, %scratch[{to}] : {FLAT}, {EIGHT}")
            with code.loop(whole, sizes.depth, 1) as d:
                to = code.add(base, code.mul(d.index, "%width"))
                for lane, (head, place) in enumerate(rows):
                    value = widen_scalar(code, code.load("%q", f"%batch, {head}, {place}, {d.index}", kind), element)
                    value = code.let(f"arith.mulf {value}, {one} : f32")
                    code.line(f"memref.store {value}, %scratch[{code.add(to, lane)}] : {FLAT}")


def _softmax(code: Code, spec: AttentionSpec) -> None:
    """Write `@softmax(.., first, width, scores, full, end, sums)`: exp in place, and 1 / sum of each lane."""
    lanes = spec.lanes
    math = VectorMath(code, lanes)
    with _part(code, spec, "softmax", "first", "width", "scores", "full", "end", "sums"):
        sizes = Sizes(code, spec)
        if spec.mask != "none":
            last = code.sub(code.add("%begin", "%count"), 1)
            with code.loop(0, "%width", 1) as lane:
                head, place = query(code, sizes, "%head", code.least(code.add("%first", lane.index), last))
                at = code.add("%scores", lane.index)
                masked(code, spec, ("%batch", head, place), ("%full", "%end"), "%scratch", at, "%width")
        whole = code.down_to_multiple("%end", UNROLLED)
        with code.loop(0, "%width", lanes) as lane:
            base = code.add("%scores", lane.index)

            def spot(c: Value, n: int, base: str = base) -> str:
                at = code.add(base, code.mul(code.add(c, n), "%width"))
                return f"%scratch[{at}] : {FLAT}, {math.kind}"

            lowest = math.spread(code.let("arith.constant 0xFF800000 : f32", "k"))

            def over(start: str, step: Callable[[str, int, str], str]) -> list[str]:
                """`step(c, n, value)` over all slots, four at once, folded by it in the end."""
                with code.loop(0, whole, UNROLLED, [start] * UNROLLED, math.kind) as c:
                    c.give([step(c.index, n, value) for n, value in enumerate(c.carried)])
                with code.loop(whole, "%end", 1, c.results[:1], math.kind) as rest:
                    rest.give([step(rest.index, 0, rest.carried[0])])
                return [rest.results[0], *c.results[1:]]

            def largest(c: str, n: int, value: str) -> str:
                return math.maximum(value, code.let(f"vector.load {spot(c, n)}"))

            parts = over(lowest, largest)
            top = math.maximum(math.maximum(parts[0], parts[1]), math.maximum(parts[2], parts[3]))
            nothing = code.let(f"arith.cmpf oeq, {top}, {lowest} : {math.kind}")
            top = math.select(nothing, math.constant(0.0), top)

            def raised(c: str, n: int, value: str, top: str = top) -> str:
                power = math.exp(math.sub(code.let(f"vector.load {spot(c, n)}"), top))
                code.line(f"vector.store {power}, {spot(c, n)}")
                return math.add(value, power)

            parts = over(math.constant(0.0), raised)
            total = math.add(math.add(parts[0], parts[1]), math.add(parts[2], parts[3]))
            # exp of -inf is a little more than 0 here, so a query that sees nothing is told by its maximum.
            share = math.select(nothing, math.constant(0.0), math.div(math.constant(1.0), total))
            code.line(f"vector.store {share}, %scratch[{code.add('%sums', lane.index)}] : {FLAT}, {math.kind}")


def _write(code: Code, spec: AttentionSpec) -> None:
    """Write `@write(.., first, width, answers, sums)`: y = the panel's answers times 1 / sum."""
    kind, element = spec.tensor, spec.element
    with _part(code, spec, "write", "first", "width", "answers", "sums"):
        sizes = Sizes(code, spec)
        whole = code.down_to_multiple(sizes.width, SIDE)
        with code.loop(0, "%width", SIDE) as group:
            rows = _lane_queries(code, sizes, "%first", group.index)
            share = code.let(f"vector.load %scratch[{code.add('%sums', group.index)}] : {FLAT}, {EIGHT}")
            base = code.add("%answers", group.index)
            with code.loop(0, whole, SIDE) as d:
                block = []
                for n in range(SIDE):
                    at = code.add(base, code.mul(code.add(d.index, n), "%width"))
                    value = code.let(f"vector.load %scratch[{at}] : {FLAT}, {EIGHT}")
                    block.append(code.let(f"arith.mulf {value}, {share} : {EIGHT}"))
                for (head, place), column in zip(rows, transpose(code, block), strict=True):
                    at = f"%y[%batch, {head}, {place}, {d.index}] : {kind}, vector<{SIDE}x{element}>"
                    code.line(f"vector.store {narrow(code, column, element, SIDE)}, {at}")
            with code.loop(whole, sizes.width, 1) as d:
                for lane, (head, place) in enumerate(rows):
                    at = code.add(base, code.add(code.mul(d.index, "%width"), lane))
                    one = code.let(f"vector.extract {share}[{lane}] : f32 from {EIGHT}")
                    value = code.let(f"arith.mulf {code.load('%scratch', at, FLAT)}, {one} : f32")
                    where = f"%y[%batch, {head}, {place}, {d.index}] : {kind}"
                    code.line(f"memref.store {narrow_scalar(code, value, element)}, {where}")
