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
from dsmoe_runtime.mlir.formats import widen_scalar
from dsmoe_runtime.mlir.function import Function, matrix, symbol
from dsmoe_runtime.mlir.levels import Level
from dsmoe_runtime.mlir.sort import IDS
from dsmoe_runtime.mlir.vector_math import VectorMath
from dsmoe_runtime.mlir.workspace import Workspace

LOGITS = matrix("f32")
ROWS = "memref<?x?xf32>"
KEYS = "memref<?x?xi32>"
SPENT, INFINITE = -(1 << 31), -2139095041  # below every key; the key of -inf
PRODUCTS = 64  # what a logit costs, in products


@dataclass(frozen=True)
class RouteSpec:
    """All that the code depends on; T and E are read from the arguments."""

    top_k: int
    score: str
    n_group: int
    topk_group: int
    group_score: str
    renormalize: bool
    eps: float
    scale: float
    bias: str | None  # its element
    level: Level

    def arguments(self) -> list[tuple[str, str]]:
        """Name and type of what is read and written for a token."""
        bias = [("%bias", matrix(self.bias, 1))] if self.bias else []
        return [("%logits", LOGITS), *bias, ("%weights", LOGITS), ("%ids", IDS)]

    def own(self) -> list[tuple[str, str]]:
        """Rows for each thread: scores a whole number of vectors, keys E and behind them G."""
        return [("%scores", ROWS), ("%keys", KEYS)]


def route_function(spec: RouteSpec) -> Function:
    """`@route(logits [T, E], bias [E]?, weights [T, K], ids [T, K])`, the last two written."""
    name = symbol("route", spec)
    code = Code(name)
    route_token(code, spec)
    shared = [*spec.arguments(), *spec.own(), ("%counters", team.COUNTERS)]
    with code.function("work", ", ".join(f"{n}: {kind}" for n, kind in shared)):
        thread = team.claim(code, 0)
        with team.claimed(code, 1, code.dim("%logits", 0, LOGITS)) as token:
            call_route(code, spec, thread, token)
    team.team(code, "work", shared)
    with code.public(name, ", ".join(f"{n}: {kind}" for n, kind in spec.arguments())):
        tokens, experts = (code.dim("%logits", axis, LOGITS) for axis in range(2))
        with code.when(code.compare("ne", tokens, 0)):
            threads = team.threads_for(code, code.mul(code.mul(tokens, experts), PRODUCTS))
            space = Workspace(code)
            space.take("%counters", "i64", 2 * team.COUNTER_SPACING)
            take_rows(code, space, spec, threads, experts)
            space.allocate()
            team.reset(code, "%counters", 2)
            team.run(code, "work", shared, threads)
            space.release()
    return Function(name, code.text(), tuple(kind for _, kind in spec.arguments()))


def take_rows(code: Code, space: Workspace, spec: RouteSpec, threads: str, experts: str) -> None:
    """Room for `own`."""
    space.take("%scores", "f32", threads, code.up_to_multiple(experts, spec.level.lanes))
    space.take("%keys", "i32", threads, code.add(experts, spec.n_group))


def call_route(code: Code, spec: RouteSpec, thread: str, token: str) -> None:
    """One token; its memory has the names that it has here."""
    given = [*spec.arguments(), *spec.own()]
    names, kinds = ", ".join(name for name, _ in given), ", ".join(kind for _, kind in given)
    code.line(f"func.call @route_token({thread}, {token}, {names}) : (index, index, {kinds}) -> ()")


def route_token(code: Code, spec: RouteSpec) -> None:
    """Write `@route_token(thread, token, ...)`."""
    given = ", ".join(f"{name}: {kind}" for name, kind in (*spec.arguments(), *spec.own()))
    with code.function("route_token", f"%thread: index, %token: index, {given}"):
        thread, token, experts = "%thread", "%token", code.dim("%logits", 1, LOGITS)
        _score(code, spec, thread, token, experts)
        with code.loop(0, experts, 1) as expert:
            value = _selection(code, spec, thread, expert.index)
            code.line(f"memref.store {_key(code, value)}, %keys[{thread}, {expert.index}] : {KEYS}")
        if spec.topk_group < spec.n_group:
            _drop_groups(code, spec, thread, experts)
        with code.loop(0, spec.top_k, 1) as k:
            best, _ = _largest(code, thread, 0, experts)
            _store_key(code, SPENT, thread, best)
            chosen = code.let(f"arith.index_cast {best} : index to i64")
            code.line(f"memref.store {chosen}, %ids[{token}, {k.index}] : {IDS}")
            value = code.let(f"memref.load %scores[{thread}, {best}] : {ROWS}")
            code.line(f"memref.store {value}, %weights[{token}, {k.index}] : {LOGITS}")
        _weigh(code, spec, token)


def _selection(code: Code, spec: RouteSpec, thread: str, expert: str) -> str:
    """What an expert is chosen by: its score, and its bias added."""
    value = code.load("%scores", f"{thread}, {expert}", ROWS)
    if spec.bias is None:
        return value
    bias = widen_scalar(code, code.load("%bias", expert, matrix(spec.bias, 1)), spec.bias)
    return code.let(f"arith.addf {value}, {bias} : f32")


def _score(code: Code, spec: RouteSpec, thread: str, token: str, experts: str) -> None:
    """scores[thread] = what `_scores` of ops/route.py gives for the row, in whole vectors; beyond E there is -inf."""
    math, lanes = VectorMath(code, spec.level.lanes), spec.level.lanes
    room = code.let(f"memref.dim %scores, {code.index(1)} : {ROWS}")
    lowest = code.let("arith.constant 0xFF800000 : f32", "k")
    with code.loop(0, room, 1) as expert:
        code.line(f"memref.store {lowest}, %scores[{thread}, {expert.index}] : {ROWS}")
    with code.loop(0, experts, 1) as expert:
        value = code.let(f"memref.load %logits[{token}, {expert.index}] : {LOGITS}")
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


def _drop_groups(code: Code, spec: RouteSpec, thread: str, experts: str) -> None:
    """Experts of all groups but the `kept` best get the key of -inf; keys of groups lie behind those of experts."""
    groups, kept = spec.n_group, spec.topk_group
    size = code.div(experts, groups)

    with code.loop(0, groups, 1) as group:
        start = code.mul(group.index, size)
        stop = code.add(start, size)
        best, key = _largest(code, thread, start, stop)
        score = _selection(code, spec, thread, best)
        if spec.group_score == "top2":
            _store_key(code, SPENT, thread, best)
            second, _ = _largest(code, thread, start, stop)
            code.line(f"memref.store {key}, %keys[{thread}, {best}] : {KEYS}")
            score = code.let(f"arith.addf {score}, {_selection(code, spec, thread, second)} : f32")
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


def _weigh(code: Code, spec: RouteSpec, token: str) -> None:
    """softmax over the K chosen where that comes last, division by their sum + eps, times scale; in place."""
    top_k, eps, scale = spec.top_k, code.constant(spec.eps, "f32"), code.constant(spec.scale, "f32")

    def each(change: str, operand: str) -> None:
        with code.loop(0, top_k, 1) as k:
            place = f"%weights[{token}, {k.index}] : {LOGITS}"
            value = code.let(f"memref.load {place}")
            code.line(f"memref.store {code.let(f'arith.{change} {value}, {operand} : f32')}, {place}")

    def folded(operation: str, start: str) -> str:
        with code.loop(0, top_k, 1, [start], "f32") as k:
            value = code.let(f"memref.load %weights[{token}, {k.index}] : {LOGITS}")
            k.give([code.let(f"arith.{operation} {k.carried[0]}, {value} : f32")])
        return k.results[0]

    zero = code.constant(0.0, "f32")
    if spec.score == "softmax_after_topk":
        math = VectorMath(code, 4)
        each("subf", folded("maximumf", code.let("arith.constant 0xFF800000 : f32", "k")))
        with code.loop(0, top_k, 1) as k:
            place = f"%weights[{token}, {k.index}] : {LOGITS}"
            vector = math.exp(math.spread(code.let(f"memref.load {place}")))
            code.line(f"memref.store {code.let(f'vector.extract {vector}[0] : f32 from {math.kind}')}, {place}")
        each("divf", folded("addf", zero))
    if spec.renormalize:
        each("divf", code.let(f"arith.addf {folded('addf', zero)}, {eps} : f32"))
    each("mulf", scale)
