"""An 8 x 8 block of float32 transposed in registers, in three rounds of shuffles.

a0 a1 a2 ..      a0 b0 a1 b1 ..      a0 b0 c0 d0 ..      a0 b0 c0 d0 e0 f0 g0 h0
b0 b1 b2 ..  ->  a2 b2 a3 b3 ..  ->  a1 b1 c1 d1 ..  ->  a1 b1 c1 d1 e1 f1 g1 h1
"""

from __future__ import annotations

from collections.abc import Sequence

from dsmoe_runtime.mlir.code import Code, Value
from dsmoe_runtime.mlir.formats import narrow, narrow_scalar
from dsmoe_runtime.mlir.row_tiles import WIDE

SIDE = 8
EIGHT = "vector<8xf32>"


def transpose(code: Code, rows: Sequence[str]) -> list[str]:
    """Eight vectors of eight -> the eight columns."""

    def both(first: list[int], second: list[int], a: str, b: str) -> list[str]:
        return [code.let(f"vector.shuffle {a}, {b} {order} : {EIGHT}, {EIGHT}", "t") for order in (first, second)]

    pairs = [
        both([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15], rows[n], rows[n + 1]) for n in range(0, 8, 2)
    ]
    fours = []
    for top in (0, 2):
        for part in range(2):
            fours.append(
                both([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15], pairs[top][part], pairs[top + 1][part])
            )
    upper, lower = fours[0] + fours[1], fours[2] + fours[3]
    halves = [
        both([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15], a, b) for a, b in zip(upper, lower, strict=True)
    ]
    return [half[0] for half in halves] + [half[1] for half in halves]


def write_transposed(
    code: Code, sums: str, rows: str, slots: tuple[str, str], end: str | None, element: str, out: tuple[str, str],
    begin: Value,
) -> None:  # fmt: skip
    """out[slot, begin + n] = sums[n, slot - slots[0]] as `element`, in blocks of 8 by 8, for slots below `end`."""
    whole = code.down_to_multiple(rows, SIDE)
    target, kind = out
    with code.loop(0, code.sub(slots[1], slots[0]), SIDE) as token:
        slot = code.add(slots[0], token.index)

        def store(number: int, at: str, what: str, vector: str) -> None:
            row = code.add(slot, number)
            if end is None:
                code.line(f"{what} {target}[{row}, {at}] : {kind}{vector}")
                return
            with code.when(code.compare("slt", row, end)):
                code.line(f"{what} {target}[{row}, {at}] : {kind}{vector}")

        with code.loop(0, whole, SIDE) as n:
            block = [
                code.let(f"vector.load {sums}[{code.add(n.index, row)}, {token.index}] : {WIDE}, {EIGHT}")
                for row in range(SIDE)
            ]
            at = code.add(begin, n.index)
            for number, column in enumerate(transpose(code, block)):
                value = narrow(code, column, element, SIDE)
                store(number, at, f"vector.store {value},", f", vector<{SIDE}x{element}>")
        with code.loop(whole, rows, 1) as n:
            at = code.add(begin, n.index)
            for lane in range(SIDE):
                value = code.load(sums, f"{n.index}, {code.add(token.index, lane)}", WIDE)
                store(lane, at, f"memref.store {narrow_scalar(code, value, element)},", "")
