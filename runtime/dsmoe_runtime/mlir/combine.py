"""The answers of each token's experts, weighted and summed in the order of k, and rounded once to the output's dtype.

    y[t] = sum over k with place[t, k] >= 0 of weights[t, k] * answers[place[t, k]]  (+ share[t] * shared[t])

A skipped slot adds nothing, whatever its weight is. The order is fixed, so are the bits.
"""

from __future__ import annotations

from dsmoe_runtime.mlir import team
from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.down import ANSWERS
from dsmoe_runtime.mlir.formats import narrow, narrow_scalar
from dsmoe_runtime.mlir.function import matrix
from dsmoe_runtime.mlir.sort import INDEX
from dsmoe_runtime.mlir.vector_math import VectorMath

WEIGHTS = matrix("f32")


def combine_arguments(output: str, shared: bool, share: bool) -> list[tuple[str, str]]:
    """Of `@combine`, after the token; shared answers lie in the order of tokens."""
    return [
        ("%weights", WEIGHTS), ("%routed_place", INDEX), ("%routed_answers", ANSWERS),
        *([("%shared_answers", ANSWERS)] if shared else []), *([("%share", WEIGHTS)] if share else []),
        ("%y", matrix(output)),
    ]  # fmt: skip


def combine(code: Code, output: str, lanes: int, *, shared: bool = False, share: bool = False) -> None:
    """Write `@combine(token, ...)`: of the shared answers all, or the sigmoid of `share` of them."""
    y, kind = matrix(output), f"vector<{lanes}xf32>"
    names = combine_arguments(output, shared, share)
    with code.function("combine", ", ".join(["%token: index", *(f"{name}: {of}" for name, of in names)])):
        top_k, hidden = code.dim("%weights", 1, WEIGHTS), code.dim("%y", 1, y)
        first = code.mul("%token", top_k)
        whole = code.down_to_multiple(hidden, lanes)
        if share:
            math = VectorMath(code, 4)
            spread = math.sigmoid(math.spread(code.load("%share", f"%token, {code.index(0)}", WEIGHTS)))
            factor = code.let(f"vector.extract {spread}[0] : f32 from {math.kind}")
        else:
            factor = code.constant(1.0, "f32")

        def weighed(weight: str, answers: str, row: str, column: str, total: str, vector: bool) -> str:
            if not vector:
                return code.let(f"math.fma {weight}, {code.load(answers, f'{row}, {column}', ANSWERS)}, {total} : f32")
            spread = code.let(f"vector.broadcast {weight} : f32 to {kind}")
            answer = code.let(f"vector.load {answers}[{row}, {column}] : {ANSWERS}, {kind}")
            return code.let(f"vector.fma {spread}, {answer}, {total} : {kind}")

        def total(column: str, vector: bool) -> str:
            of = kind if vector else "f32"
            with code.loop(0, top_k, 1, [code.constant(0.0, of)], of) as k:
                place = code.load("%routed_place", code.add(first, k.index), INDEX)
                weight = code.load("%weights", f"%token, {k.index}", WEIGHTS)
                result = code.name("sum")
                condition = code.compare("sge", place, 0)
                with code.region(f"{result} = scf.if {condition} -> ({of})", tail=None):
                    added = weighed(weight, "%routed_answers", place, column, k.carried[0], vector)
                    code.line(f"scf.yield {added} : {of}")
                with code.region("} else"):
                    code.line(f"scf.yield {k.carried[0]} : {of}")
                k.give([result])
            if not shared:
                return k.results[0]
            return weighed(factor, "%shared_answers", "%token", column, k.results[0], vector)

        with code.loop(0, whole, lanes) as h:
            value = narrow(code, total(h.index, True), output, lanes)
            code.line(f"vector.store {value}, %y[%token, {h.index}] : {y}, vector<{lanes}x{output}>")
        with code.loop(whole, hidden, 1) as h:
            value = narrow_scalar(code, total(h.index, False), output)
            code.line(f"memref.store {value}, %y[%token, {h.index}] : {y}")


def combine_all(code: Code, counter: int, output: str, *, shared: bool = False, share: bool = False) -> None:
    """Every token, whoever is free."""
    names = combine_arguments(output, shared, share)
    with team.claimed(code, counter, code.dim("%y", 0, matrix(output))) as token:
        code.line(
            f"func.call @combine({', '.join([token, *(name for name, _ in names)])}) : "
            f"({', '.join(['index', *(kind for _, kind in names)])}) -> ()"
        )
