"""Writes in place: rows of a cache at given slots, and whole values over an input.

    index_copy_(cache [B, H, C, D], 2, index [S], source [B, H, S, D])      write_slots
    copy_(target, source)                                                   write_over

The rest of the memory is not touched, and so not copied.
"""

from __future__ import annotations

from contextlib import ExitStack

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.function import Function, matrix

INDICES = "memref<?xi64, strided<[1], offset: ?>>"


def write_slots(element: str, rank: int, dim: int) -> Function:
    """target[..., index[s], ...] = source[..., s, ...] along `dim`. Slots are in range: the caller has checked them."""
    name, kind = f"write_slots_{element}_{rank}_{dim}", matrix(element, rank)
    code = Code()
    with code.public(name, f"%target: {kind}, %index: {INDICES}, %source: {kind}"), ExitStack() as loops:
        places = [
            loops.enter_context(code.loop(0, code.let(f"memref.dim %source, {code.index(d)} : {kind}"), 1)).index
            for d in range(rank)
        ]
        slot = code.let(f"memref.load %index[{places[dim]}] : {INDICES}")
        slots = [*places]
        slots[dim] = code.let(f"arith.index_cast {slot} : i64 to index")
        value = code.let(f"memref.load %source[{', '.join(places)}] : {kind}")
        code.line(f"memref.store {value}, %target[{', '.join(slots)}] : {kind}")
    return Function(name, code.text(), (kind, INDICES, kind))


def write_over(element: str, rank: int) -> Function:
    """target[...] = source[...]; both have the same shape."""
    name, kind = f"write_over_{element}_{rank}", matrix(element, rank)
    code = Code()
    with code.public(name, f"%target: {kind}, %source: {kind}"), ExitStack() as loops:
        places = [
            loops.enter_context(code.loop(0, code.let(f"memref.dim %source, {code.index(d)} : {kind}"), 1)).index
            for d in range(rank)
        ]
        value = code.let(f"memref.load %source[{', '.join(places)}] : {kind}")
        code.line(f"memref.store {value}, %target[{', '.join(places)}] : {kind}")
    return Function(name, code.text(), (kind, kind))
