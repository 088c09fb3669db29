"""aten.topk of rows: the K largest in falling order, the lowest index first among equals, NaN above all.

torch-mlir sorts the whole row for it. Here, K times over a row: the largest key below the last one taken. A key
holds the value's bits, inverted where they are negative, so that they compare as integers, and below them the index.
"""

from __future__ import annotations

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.formats import widen_scalar
from dsmoe_runtime.mlir.function import Function, matrix

LEAST, MOST = -(1 << 63), (1 << 63) - 1


def topk_function(element: str) -> Function:
    """`@topk(x [M, N], values [M, K], indices [M, K])`."""
    name, kind, ids = f"topk_{element}", matrix(element), matrix("i64")
    code = Code(name)

    def number(value: int, bits: int = 64) -> str:
        return code.let(f"arith.constant {value} : i{bits}", "k")

    with code.function("key", f"%x: {kind}, %row: index, %at: index", "i64"):
        value = widen_scalar(code, code.let(f"memref.load %x[%row, %at] : {kind}"), element)
        is_nan = code.let(f"arith.cmpf uno, {value}, {value} : f32")
        word = code.let(f"arith.bitcast {value} : f32 to i32")
        sign = code.let(f"arith.shrsi {word}, {number(31, 32)} : i32")
        mask = code.let(f"arith.shrui {sign}, {number(1, 32)} : i32")
        ordered = code.let(f"arith.xori {word}, {mask} : i32")
        ordered = code.let(f"arith.select {is_nan}, {number((1 << 31) - 1, 32)}, {ordered} : i32")
        high = code.let(f"arith.shli {code.let(f'arith.extsi {ordered} : i32 to i64')}, {number(32)} : i64")
        place = code.let("arith.index_cast %at : index to i64")
        low = code.let(f"arith.subi {number((1 << 32) - 1)}, {place} : i64")
        code.line(f"return {code.let(f'arith.ori {high}, {low} : i64')} : i64")
    with code.public(name, f"%x: {kind}, %values: {kind}, %indices: {ids}"):
        rows, size = (code.let(f"memref.dim %x, {code.index(axis)} : {kind}") for axis in range(2))
        count = code.let(f"memref.dim %values, {code.index(1)} : {kind}")
        least, last = number(LEAST), number(MOST)
        with code.loop(0, rows, 1) as row, code.loop(0, count, 1, [last], "i64") as pick:
            with code.loop(0, size, 1, [least], "i64") as one:
                key = code.let(f"func.call @key(%x, {row.index}, {one.index}) : ({kind}, index, index) -> i64")
                below = code.let(f"arith.cmpi slt, {key}, {pick.carried[0]} : i64")
                larger = code.let(f"arith.cmpi sgt, {key}, {one.carried[0]} : i64")
                better = code.let(f"arith.andi {below}, {larger} : i1")
                one.give([code.let(f"arith.select {better}, {key}, {one.carried[0]} : i64")])
            low = code.let(f"arith.andi {one.results[0]}, {number((1 << 32) - 1)} : i64")
            place = code.let(f"arith.subi {number((1 << 32) - 1)}, {low} : i64")
            at = code.let(f"arith.index_cast {place} : i64 to index")
            value = code.let(f"memref.load %x[{row.index}, {at}] : {kind}")
            code.line(f"memref.store {value}, %values[{row.index}, {pick.index}] : {kind}")
            code.line(f"memref.store {place}, %indices[{row.index}, {pick.index}] : {ids}")
            pick.give([one.results[0]])
    return Function(name, code.text(), (kind, kind, ids))
