"""Storage formats: how float32, bfloat16 and float16 in memory become float32 in registers, and back.

bfloat16 is the upper half of a float32, so widening is a shift, and so is nothing that AVX2 lacks:

    %raw  = vector.load %w[%k] : memref<?xbf16>, vector<16xbf16>      a b c d ...
    %word = vector.bitcast %raw : vector<16xbf16> to vector<8xi32>    ba dc ...
    %even = arith.shli %word, 16                                      a  c  ...   as float32
    %odd  = arith.andi %word, 0xffff0000                              b  d  ...   as float32
"""

from __future__ import annotations

import torch

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.code import Code

TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def type_of(dtype: torch.dtype) -> str:
    """MLIR's name of a dtype that the CPU kernels take."""
    if dtype not in TYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in TYPES)
        raise TargetError(f"the mlir-cpu kernels take {names}, not {str(dtype).removeprefix('torch.')}; cast the model")
    return TYPES[dtype]


def widen(code: Code, value: str, element: str, lanes: int) -> str:
    """A vector of `lanes` stored values -> float32, in their order."""
    wide = f"vector<{lanes}xf32>"
    if element == "f32":
        return value
    if element == "f16":
        return code.let(f"arith.extf {value} : vector<{lanes}xf16> to {wide}")
    half = code.let(f"vector.bitcast {value} : vector<{lanes}xbf16> to vector<{lanes}xi16>")
    word = code.let(f"arith.extui {half} : vector<{lanes}xi16> to vector<{lanes}xi32>")
    sixteen = code.let(f"arith.constant dense<16> : vector<{lanes}xi32>", "k")
    high = code.let(f"arith.shli {word}, {sixteen} : vector<{lanes}xi32>")
    return code.let(f"vector.bitcast {high} : vector<{lanes}xi32> to {wide}")


def widen_scalar(code: Code, value: str, element: str) -> str:
    """One stored value -> float32."""
    if element == "f32":
        return value
    if element == "f16":
        return code.let(f"arith.extf {value} : f16 to f32")
    half = code.let(f"arith.bitcast {value} : bf16 to i16")
    word = code.let(f"arith.extui {half} : i16 to i32")
    sixteen = code.let("arith.constant 16 : i32", "k")
    high = code.let(f"arith.shli {word}, {sixteen} : i32")
    return code.let(f"arith.bitcast {high} : i32 to f32")


def every_second(code: Code, value: str, lanes: int, odd: int) -> str:
    """The even or the odd ones of a vector of 2 `lanes` bfloat16 as float32: one shift or one mask, no shuffle."""
    words = f"vector<{lanes}xi32>"
    word = code.let(f"vector.bitcast {value} : vector<{2 * lanes}xbf16> to {words}")
    if odd:
        high = code.let(f"arith.andi {word}, {code.let(f'arith.constant dense<-65536> : {words}', 'k')} : {words}")
    else:
        high = code.let(f"arith.shli {word}, {code.let(f'arith.constant dense<16> : {words}', 'k')} : {words}")
    return code.let(f"vector.bitcast {high} : {words} to vector<{lanes}xf32>")


def narrow(code: Code, value: str, element: str, lanes: int) -> str:
    """Float32 -> the stored format, to nearest even; of a bfloat16 NaN the quiet bit is set, as in torch."""
    wide = f"vector<{lanes}xf32>"
    if element == "f32":
        return value
    if element == "f16":
        return code.let(f"arith.truncf {value} : {wide} to vector<{lanes}xf16>")
    words = f"vector<{lanes}xi32>"

    def constant(number: int) -> str:
        return code.let(f"arith.constant dense<{number}> : {words}", "k")

    word = code.let(f"vector.bitcast {value} : {wide} to {words}")
    sixteen = constant(16)
    last = code.let(f"arith.andi {code.let(f'arith.shrui {word}, {sixteen} : {words}')}, {constant(1)} : {words}")
    bias = code.let(f"arith.addi {last}, {constant(0x7FFF)} : {words}")
    rounded = code.let(f"arith.shrui {code.let(f'arith.addi {word}, {bias} : {words}')}, {sixteen} : {words}")
    is_nan = code.let(f"arith.cmpf uno, {value}, {value} : {wide}")
    kept = code.let(f"arith.select {is_nan}, {constant(0x7FC0)}, {rounded} : vector<{lanes}xi1>, {words}")
    half = code.let(f"arith.trunci {kept} : {words} to vector<{lanes}xi16>")
    return code.let(f"vector.bitcast {half} : vector<{lanes}xi16> to vector<{lanes}xbf16>")


def narrow_scalar(code: Code, value: str, element: str) -> str:
    """`narrow` of one value."""
    if element == "f32":
        return value
    if element == "f16":
        return code.let(f"arith.truncf {value} : f32 to f16")

    def constant(number: int) -> str:
        return code.let(f"arith.constant {number} : i32", "k")

    word = code.let(f"arith.bitcast {value} : f32 to i32")
    last = code.let(f"arith.andi {code.let(f'arith.shrui {word}, {constant(16)} : i32')}, {constant(1)} : i32")
    bias = code.let(f"arith.addi {last}, {constant(0x7FFF)} : i32")
    rounded = code.let(f"arith.shrui {code.let(f'arith.addi {word}, {bias} : i32')}, {constant(16)} : i32")
    is_nan = code.let(f"arith.cmpf uno, {value}, {value} : f32")
    half = code.let(
        f"arith.trunci {code.let(f'arith.select {is_nan}, {constant(0x7FC0)}, {rounded} : i32')} : i32 to i16"
    )
    return code.let(f"arith.bitcast {half} : i16 to bf16")
