"""dsmoe.route lowered: scores of a token, the K largest of them, and their weights.

before
    %weights, %experts = torch.operator "torch.dsmoe.route"(%logits, %bias, ...)

after, for each token on whichever thread is free
    scores = softmax | sigmoid | sqrt(softplus) of a row of logits          vectors
    keys   = scores + bias as integers that sort alike, NaN the largest     a dropped group: the key of -inf
    K times: the largest key, the lowest index of equals; then it is spent  no sort of all E
    weights = the scores chosen, renormalised, scaled

A float's bits, with all but the sign inverted where it is negative, compare as signed integers like the floats.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_runtime.mlir import team
from dsmoe_runtime.mlir.code import Code, Value
from dsmoe_runtime.mlir.levels import Level
from dsmoe_runtime.mlir.vector_math import VectorMath

ROWS = "memref<?x?xf32>"
KEYS = "memref<?x?xi32>"
IDS = "memref<?x?xi64>"
SPENT, INFINITE = -(1 << 31), -2139095041  # below every key; the key of -inf


@dataclass(frozen=True)
class RouteSpec:
    """All that the code depends on; T, E, K and the numbers of groups are read from the arguments."""

    score: str
    group_score: str
    bias: bool
    renormalize: bool
    level: Level

    def arguments(self) -> list[tuple[str, str]]:
        """Name and memref type of what the kernel is handed.

        sizes: K, G, and how many groups count; scalars: eps, scale; scores and keys: a row for each thread, scores a
        whole number of vectors, keys E and behind them G.
        """
        return [
            ("%logits", ROWS), *([("%bias", "memref<?xf32>")] if self.bias else []), ("%weights", ROWS), ("%ids", IDS),
            ("%sizes", "memref<?xindex>"), ("%scalars", "memref<?xf32>"), ("%counters", team.COUNTERS),
            ("%scores", ROWS), ("%keys", KEYS),
        ]  # fmt: skip


def lower_route(spec: RouteSpec) -> str:
    """The whole module."""
    code = Code()
    code.line(team.EXTERNAL)
    signature = ", ".join(f"{name}: {kind}" for name, kind in spec.arguments())
    with code.function("prepare", signature):
        zero = code.let("arith.constant 0 : i64", "k")
        for counter in range(2):
            code.line(f"memref.store {zero}, %counters[{code.index(counter * team.COUNTER_SPACING)}] : {team.COUNTERS}")
    with code.function("work", signature):
        thread = team.claim(code, 0)
        tokens, experts = (code.let(f"memref.dim %logits, {code.index(n)} : {ROWS}") for n in (0, 1))
        with team.claimed(code, 1, tokens) as token:
            route_token(code, spec, thread, token, experts)
    team.entry_points(code, "route", spec.arguments())
    return f"module {{\n{code.text()}\n}}\n"


def route_token(code: Code, spec: RouteSpec, thread: str, token: str, experts: str) -> None:
    """The body of one token."""
    top_k, groups, kept = (code.let(f"memref.load %sizes[{code.index(n)}] : memref<?xindex>") for n in range(3))
    _score(code, spec, thread, token, experts)
    with code.loop(0, experts, 1) as expert:
        value = code.let(f"memref.load %scores[{thread}, {expert.index}] : {ROWS}")
        if spec.bias:
            value = code.let(
                f"arith.addf {value}, {code.let(f'memref.load %bias[{expert.index}] : memref<?xf32>')} : f32"
            )
        code.line(f"memref.store {_key(code, value)}, %keys[{thread}, {expert.index}] : {KEYS}")
    with code.when(code.compare("ult", kept, groups)):
        _drop_groups(code, spec, thread, experts, groups, kept)
    with code.loop(0, top_k, 1) as k:
        best, _ = _largest(code, thread, 0, experts)
        _store_key(code, SPENT, thread, best)
        code.line(
            f"memref.store {code.let(f'arith.index_cast {best} : index to i64')}, %ids[{token}, {k.index}] : {IDS}"
        )
        value = code.let(f"memref.load %scores[{thread}, {best}] : {ROWS}")
        code.line(f"memref.store {value}, %weights[{token}, {k.index}] : {ROWS}")
    _weigh(code, spec, token, top_k)


def _score(code: Code, spec: RouteSpec, thread: str, token: str, experts: str) -> None:
    """scores[thread] = what `_scores` of ops/route.py gives for the row, in whole vectors; beyond E there is -inf."""
    math, lanes = VectorMath(code, spec.level.lanes), spec.level.lanes
    room = code.let(f"memref.dim %scores, {code.index(1)} : {ROWS}")
    lowest = code.let("arith.constant 0xFF800000 : f32", "k")
    with code.loop(0, room, 1) as expert:
        code.line(f"memref.store {lowest}, %scores[{thread}, {expert.index}] : {ROWS}")
    with code.loop(0, experts, 1) as expert:
        value = code.let(f"memref.load %logits[{token}, {expert.index}] : {ROWS}")
        code.line(f"memref.store {value}, %scores[{thread}, {expert.index}] : {ROWS}")
    if spec.score == "softmax_after_topk":
        return
    if spec.score != "softmax":
        with code.loop(0, room, lanes) as at:
            place = f"%scores[{thread}, {at.index}] : {ROWS}, {math.kind}"
            value = code.let(f"vector.load {place}")
            if spec.score == "sigmoid":
                value = math.sigmoid(value)
            else:
                value = code.let(f"math.sqrt {math.softplus(value)} : {math.kind}")
            code.line(f"vector.store {value}, {place}")
        return
    with code.loop(0, room, lanes, [math.spread(lowest)], math.kind) as at:
        value = code.let(f"vector.load %scores[{thread}, {at.index}] : {ROWS}, {math.kind}")
        at.give([math.maximum(at.carried[0], value)])
    largest = math.spread(code.let(f"vector.reduction <maximumf>, {at.results[0]} : {math.kind} into f32"))
    with code.loop(0, room, lanes, [math.constant(0.0)], math.kind) as at:
        place = f"%scores[{thread}, {at.index}] : {ROWS}, {math.kind}"
        value = math.exp(math.sub(code.let(f"vector.load {place}"), largest))
        code.line(f"vector.store {value}, {place}")
        at.give([math.add(at.carried[0], value)])
    total = code.let(f"vector.reduction <add>, {at.results[0]} fastmath<reassoc> : {math.kind} into f32")
    with code.loop(0, room, lanes) as at:
        place = f"%scores[{thread}, {at.index}] : {ROWS}, {math.kind}"
        code.line(f"vector.store {math.div(code.let(f'vector.load {place}'), math.spread(total))}, {place}")


def _key(code: Code, value: str) -> str:
    """An integer that sorts as the float does: -0 as 0, NaN above all."""
    plain = code.let(f"arith.addf {value}, {code.constant(0.0, 'f32')} : f32")
    bits = code.let(f"arith.bitcast {plain} : f32 to i32")
    sign = code.let(f"arith.shrsi {bits}, {code.let('arith.constant 31 : i32', 'k')} : i32")
    most = code.let("arith.constant 2147483647 : i32", "k")
    key = code.let(f"arith.xori {bits}, {code.let(f'arith.andi {sign}, {most} : i32')} : i32")
    is_nan = code.let(f"arith.cmpf uno, {value}, {value} : f32")
    return code.let(f"arith.select {is_nan}, {most}, {key} : i32")


def _store_key(code: Code, key: int, thread: str, at: str) -> None:
    value = code.let(f"arith.constant {key} : i32", "k")
    code.line(f"memref.store {value}, %keys[{thread}, {at}] : {KEYS}")


def _largest(code: Code, thread: str, start: Value, stop: Value) -> tuple[str, str]:
    """The place of the largest key in [start, stop), the first of equals, and the key."""
    start, stop = code.index(start), code.index(stop)
    first = code.let(f"memref.load %keys[{thread}, {start}] : {KEYS}")
    place, key, index = code.name("place"), code.name("key"), code.name("i")
    one = code.index(1)
    best, most = code.name("best"), code.name("most")
    result = code.name("largest")
    with code.region(
        f"{result}:2 = scf.for {index} = {start} to {stop} step {one} iter_args({place} = {start}, {key} = {first}) "
        "-> (index, i32)"
    ):
        here = code.let(f"memref.load %keys[{thread}, {index}] : {KEYS}")
        larger = code.let(f"arith.cmpi sgt, {here}, {key} : i32")
        code.line(f"{best} = arith.select {larger}, {index}, {place} : index")
        code.line(f"{most} = arith.select {larger}, {here}, {key} : i32")
        code.line(f"scf.yield {best}, {most} : index, i32")
    return f"{result}#0", f"{result}#1"


def _drop_groups(code: Code, spec: RouteSpec, thread: str, experts: str, groups: str, kept: str) -> None:
    """Experts of all groups but the `kept` best get the key of -inf; keys of groups lie behind those of experts."""
    size = code.div(experts, groups)

    def selection(at: str) -> str:
        value = code.let(f"memref.load %scores[{thread}, {at}] : {ROWS}")
        if not spec.bias:
            return value
        return code.let(f"arith.addf {value}, {code.let(f'memref.load %bias[{at}] : memref<?xf32>')} : f32")

    with code.loop(0, groups, 1) as group:
        start = code.mul(group.index, size)
        stop = code.add(start, size)
        best, key = _largest(code, thread, start, stop)
        score = selection(best)
        if spec.group_score == "top2":
            _store_key(code, SPENT, thread, best)
            second, _ = _largest(code, thread, start, stop)
            code.line(f"memref.store {key}, %keys[{thread}, {best}] : {KEYS}")
            score = code.let(f"arith.addf {score}, {selection(second)} : f32")
        code.line(f"memref.store {_key(code, score)}, %keys[{thread}, {code.add(experts, group.index)}] : {KEYS}")
    end = code.add(experts, groups)
    with code.loop(0, kept, 1):
        best, _ = _largest(code, thread, experts, end)
        _store_key(code, SPENT, thread, best)
    with code.loop(0, groups, 1) as group:
        key = code.let(f"memref.load %keys[{thread}, {code.add(experts, group.index)}] : {KEYS}")
        spent = code.let(f"arith.constant {SPENT} : i32", "k")
        with code.when(code.let(f"arith.cmpi ne, {key}, {spent} : i32")):
            start = code.mul(group.index, size)
            with code.loop(start, code.add(start, size), 1) as expert:
                _store_key(code, INFINITE, thread, expert.index)


def _weigh(code: Code, spec: RouteSpec, token: str, top_k: str) -> None:
    """softmax over the K chosen where that comes last, division by their sum + eps, times scale; in place."""
    eps, scale = (code.let(f"memref.load %scalars[{code.index(n)}] : memref<?xf32>") for n in (0, 1))

    def each(change: str, operand: str) -> None:
        with code.loop(0, top_k, 1) as k:
            place = f"%weights[{token}, {k.index}] : {ROWS}"
            value = code.let(f"memref.load {place}")
            code.line(f"memref.store {code.let(f'arith.{change} {value}, {operand} : f32')}, {place}")

    def folded(operation: str, start: str) -> str:
        with code.loop(0, top_k, 1, [start], "f32") as k:
            value = code.let(f"memref.load %weights[{token}, {k.index}] : {ROWS}")
            k.give([code.let(f"arith.{operation} {k.carried[0]}, {value} : f32")])
        return k.results[0]

    zero = code.constant(0.0, "f32")
    if spec.score == "softmax_after_topk":
        math = VectorMath(code, 4)
        each("subf", folded("maximumf", code.let("arith.constant 0xFF800000 : f32", "k")))
        with code.loop(0, top_k, 1) as k:
            place = f"%weights[{token}, {k.index}] : {ROWS}"
            vector = math.exp(math.spread(code.let(f"memref.load {place}")))
            code.line(f"memref.store {code.let(f'vector.extract {vector}[0] : f32 from {math.kind}')}, {place}")
        each("divf", folded("addf", zero))
    if spec.renormalize:
        each("divf", code.let(f"arith.addf {folded('addf', zero)}, {eps} : f32"))
    each("mulf", scale)
