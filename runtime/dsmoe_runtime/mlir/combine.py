"""The answers of each token's experts, weighted and summed in the order of k, and rounded once to the output's dtype.

    y[t] = sum over k with place[t, k] >= 0 of weights[t, k] * answers[place[t, k]]

A skipped slot adds nothing, whatever its weight is. The order is fixed, so are the bits.
"""

from __future__ import annotations

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.formats import narrow, narrow_scalar
from dsmoe_runtime.mlir.sort import INDEX

WEIGHTS = "memref<?x?xf32>"
ANSWERS = "memref<?x?xf32>"
OUTPUT = "memref<?x?x{}>"


def combine(code: Code, element: str, lanes: int) -> None:
    """Write `@combine(token, weights, place, answers, y)`."""
    output, kind = OUTPUT.format(element), f"vector<{lanes}xf32>"
    with code.function(
        "combine", f"%token: index, %weights: {WEIGHTS}, %place: {INDEX}, %answers: {ANSWERS}, %y: {output}"
    ):
        top_k = code.let(f"memref.dim %weights, {code.index(1)} : {WEIGHTS}")
        hidden = code.let(f"memref.dim %y, {code.index(1)} : {output}")
        first = code.mul("%token", top_k)
        whole = code.down_to_multiple(hidden, lanes)

        def total(column: str, vector: bool) -> str:
            of = kind if vector else "f32"
            with code.loop(0, top_k, 1, [code.constant(0.0, of)], of) as k:
                place = code.let(f"memref.load %place[{code.add(first, k.index)}] : {INDEX}")
                weight = code.let(f"memref.load %weights[%token, {k.index}] : {WEIGHTS}")
                result = code.name("sum")
                condition = code.compare("sge", place, 0)
                with code.region(f"{result} = scf.if {condition} -> ({of})", tail=None):
                    if vector:
                        spread = code.let(f"vector.broadcast {weight} : f32 to {kind}")
                        answer = code.let(f"vector.load %answers[{place}, {column}] : {ANSWERS}, {kind}")
                        added = code.let(f"vector.fma {spread}, {answer}, {k.carried[0]} : {kind}")
                    else:
                        answer = code.let(f"memref.load %answers[{place}, {column}] : {ANSWERS}")
                        added = code.let(f"math.fma {weight}, {answer}, {k.carried[0]} : f32")
                    code.line(f"scf.yield {added} : {of}")
                with code.region("} else"):
                    code.line(f"scf.yield {k.carried[0]} : {of}")
                k.give([result])
            return k.results[0]

        with code.loop(0, whole, lanes) as h:
            value = narrow(code, total(h.index, True), element, lanes)
            code.line(f"vector.store {value}, %y[%token, {h.index}] : {output}, vector<{lanes}x{element}>")
        with code.loop(whole, hidden, 1) as h:
            value = narrow_scalar(code, total(h.index, False), element)
            code.line(f"memref.store {value}, %y[%token, {h.index}] : {output}")
