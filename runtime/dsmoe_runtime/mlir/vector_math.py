"""exp, sigmoid, tanh and erf on vectors of float32, and the activations of ops/activation.py made of them.

MLIR's math dialect would call the scalar functions of libm lane by lane; these are polynomials. silu by them is at most
1.7e-7 off (relative), torch's 1.3e-7. NaN gives NaN.

    exp(x) = 2^n p(x - n ln 2),  n = round(x / ln 2), ln 2 in two parts (Cephes)
    erf(x) = x P(x^2) / Q(x^2) on [-4, 4], and its ends outside (Eigen)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.ops.activation import CUBIC

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_ERF_P = (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04,
    -2.95459980854025e-03, -1.60960333262415e-02,
)  # fmt: skip
_ERF_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
          -1.42647390514189e-02)  # fmt: skip


class VectorMath:
    """Float32 arithmetic on vectors of `lanes`, written into `code`."""

    def __init__(self, code: Code, lanes: int) -> None:
        self.code, self.kind, self.words = code, f"vector<{lanes}xf32>", f"vector<{lanes}xi32>"
        self.lanes = lanes

    def constant(self, value: float) -> str:
        return self.code.constant(value, self.kind)

    def spread(self, scalar: str) -> str:
        """The same float32 in every lane."""
        return self.code.let(f"vector.broadcast {scalar} : f32 to {self.kind}")

    def _binary(self, operation: str, a: str, b: str) -> str:
        return self.code.let(f"arith.{operation} {a}, {b} : {self.kind}")

    def add(self, a: str, b: str) -> str:
        return self._binary("addf", a, b)

    def sub(self, a: str, b: str) -> str:
        return self._binary("subf", a, b)

    def mul(self, a: str, b: str) -> str:
        return self._binary("mulf", a, b)

    def div(self, a: str, b: str) -> str:
        return self._binary("divf", a, b)

    def minimum(self, a: str, b: str) -> str:
        return self._binary("minimumf", a, b)

    def maximum(self, a: str, b: str) -> str:
        return self._binary("maximumf", a, b)

    def fma(self, a: str, b: str, c: str) -> str:
        return self.code.let(f"vector.fma {a}, {b}, {c} : {self.kind}")

    def polynomial(self, x: str, coefficients: Sequence[float]) -> str:
        """By Horner's rule, the highest power's coefficient first."""
        value = self.constant(coefficients[0])
        for coefficient in coefficients[1:]:
            value = self.fma(value, x, self.constant(coefficient))
        return value

    def exp(self, x: str) -> str:
        code = self.code
        low, high = self.constant(-104.0), self.constant(89.0)
        bounded = self.minimum(self.maximum(x, low), high)
        scaled = self.fma(bounded, self.constant(1 / math.log(2)), self.constant(0.5))
        n = code.let(f"math.floor {scaled} : {self.kind}")
        r = self.fma(n, self.constant(-0.693359375), bounded)
        r = self.fma(n, self.constant(2.12194440e-4), r)
        tail = self.fma(self.mul(r, r), self.polynomial(r, _EXP), r)
        value = self.add(tail, self.constant(1.0))
        # 2^n in two factors: one alone leaves the exponent's range at both ends.
        whole = code.let(f"arith.fptosi {n} : {self.kind} to {self.words}")
        one = code.let(f"arith.constant dense<1> : {self.words}", "k")
        half = code.let(f"arith.shrsi {whole}, {one} : {self.words}")
        rest = code.let(f"arith.subi {whole}, {half} : {self.words}")
        return self.mul(self.mul(value, self._power_of_two(half)), self._power_of_two(rest))

    def _power_of_two(self, n: str) -> str:
        code = self.code
        bias = code.let(f"arith.constant dense<127> : {self.words}", "k")
        shift = code.let(f"arith.constant dense<23> : {self.words}", "k")
        biased = code.let(f"arith.addi {n}, {bias} : {self.words}")
        bits = code.let(f"arith.shli {biased}, {shift} : {self.words}")
        return code.let(f"vector.bitcast {bits} : {self.words} to {self.kind}")

    def log(self, x: str) -> str:
        """Of positive, finite, normal numbers (Cephes)."""
        code = self.code

        def word(value: int) -> str:
            return code.let(f"arith.constant dense<{value}> : {self.words}", "k")

        bits = code.let(f"vector.bitcast {x} : {self.kind} to {self.words}")
        # x = 2^n m with m in [sqrt(1/2), sqrt(2))
        shifted = code.let(f"arith.subi {bits}, {word(0x3F3504F3)} : {self.words}")
        n = code.let(f"arith.shrsi {shifted}, {word(23)} : {self.words}")
        scale = code.let(f"arith.shli {n}, {word(23)} : {self.words}")
        mantissa = code.let(f"arith.subi {bits}, {scale} : {self.words}")
        m = code.let(f"vector.bitcast {mantissa} : {self.words} to {self.kind}")
        n = code.let(f"arith.sitofp {n} : {self.words} to {self.kind}")
        r = self.sub(m, self.constant(1.0))
        square = self.mul(r, r)
        y = self.mul(self.mul(self.polynomial(r, _LOG), r), square)
        y = self.fma(n, self.constant(-2.12194440e-4), y)
        y = self.fma(square, self.constant(-0.5), y)
        return self.fma(n, self.constant(0.693359375), self.add(r, y))

    def softplus(self, x: str) -> str:
        """log(1 + exp(x)), and x itself from 20 on, as torch has it; 1 + e is rounded, and that is put right."""
        e, one = self.exp(self.minimum(x, self.constant(20.0))), self.constant(1.0)
        total = self.add(one, e)
        kept = self.sub(total, one)
        value = self.mul(self.log(total), self.div(e, kept))
        nothing = self.code.let(f"arith.cmpf oeq, {kept}, {self.constant(0.0)} : {self.kind}")
        value = self.select(nothing, e, value)
        return self.select(self.code.let(f"arith.cmpf ugt, {x}, {self.constant(20.0)} : {self.kind}"), x, value)

    def select(self, condition: str, a: str, b: str) -> str:
        return self.code.let(f"arith.select {condition}, {a}, {b} : vector<{self.lanes}xi1>, {self.kind}")

    def sigmoid(self, x: str) -> str:
        one = self.constant(1.0)
        return self.div(one, self.add(one, self.exp(self.sub(self.constant(0.0), x))))

    def erf(self, x: str) -> str:
        x = self.minimum(self.maximum(x, self.constant(-4.0)), self.constant(4.0))
        square = self.mul(x, x)
        return self.div(self.mul(x, self.polynomial(square, _ERF_P)), self.polynomial(square, _ERF_Q))

    def activation(self, name: str, gate: str, up: str | None, alpha: str, limit: str) -> str:
        """`activate` of ops/activation.py; alpha and limit are vectors."""
        if name in ("silu_clamped", "swiglu_oai"):
            assert up is not None, name
            gate = self.minimum(gate, limit)
            up = self.minimum(self.maximum(up, self.sub(self.constant(0.0), limit)), limit)
            if name == "swiglu_oai":
                hidden = self.mul(gate, self.sigmoid(self.mul(alpha, gate)))
                return self.mul(self.add(up, self.constant(1.0)), hidden)
        hidden = self._pointwise(name, gate)
        return hidden if up is None else self.mul(hidden, up)

    def _pointwise(self, name: str, x: str) -> str:
        if name == "gelu":
            half = self.mul(x, self.constant(0.5))
            return self.mul(half, self.add(self.constant(1.0), self.erf(self.mul(x, self.constant(math.sqrt(0.5))))))
        if name == "gelu_tanh":  # (1 + tanh z) / 2 is sigmoid(2 z)
            outer = self.constant(2 * math.sqrt(2 / math.pi))
            inner = self.fma(self.mul(self.mul(x, x), x), self.constant(CUBIC), x)
            return self.mul(x, self.sigmoid(self.mul(outer, inner)))
        if name in ("relu", "relu2"):
            hidden = self.maximum(x, self.constant(0.0))
            return hidden if name == "relu" else self.mul(hidden, hidden)
        return self.mul(x, self.sigmoid(x))
