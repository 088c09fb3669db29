"""What the processor can do at most: float32 products a second and bytes read a second, by code of our own in a loop.

Library calls are no measure: torch's GEMM reaches half of the peak on some processors. Products: 12 sums in registers,
as many as a register tile has. Reading: sums over memory far larger than the caches, with the prefetches that the
kernels have too. Threads are those of the kernels.
"""

from __future__ import annotations

import ctypes
import functools
import time

import torch

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.compile import compile_object
from dsmoe_runtime.mlir.descriptors import Arguments, of_memory, of_tensor
from dsmoe_runtime.mlir.levels import best_level
from dsmoe_runtime.mlir.loader import LoadedObject
from dsmoe_runtime.mlir.team import COUNTERS, EXTERNAL, claimed, entry_points

FLAT = "memref<?xf32>"
SUMS = 12
TURNS = 20_000  # of an item of products
BLOCK = 1 << 16  # float32s of an item of reading
STREAMS = 4  # it is read in so many places at once: one stream alone does not keep memory busy


def _source(name: str) -> str:
    """A module with `@name`: items are claimed by all threads of one region, as in the kernels."""
    code, lanes = Code(), best_level().lanes
    kind = f"vector<{lanes}xf32>"
    arguments = [("%x", FLAT), ("%sums", FLAT), ("%counters", COUNTERS)]
    signature = ", ".join(f"{argument}: {type_}" for argument, type_ in arguments)
    code.line(EXTERNAL)
    with code.function("prepare", signature):
        zero = code.let("arith.constant 0 : i64")
        code.line(f"memref.store {zero}, %counters[{code.index(0)}] : {COUNTERS}")
    with code.function("work", signature):
        size = code.let(f"memref.dim %x, {code.index(0)} : {FLAT}")
        with claimed(code, 0, code.div(size, BLOCK)) as item:
            base = code.mul(item, BLOCK)
            start = code.let(f"vector.load %x[{base}] : {FLAT}, {kind}")
            factor = code.let(f"vector.load %x[{code.add(base, lanes)}] : {FLAT}, {kind}")
            turns, step = (TURNS, 1) if name == "products" else (BLOCK // STREAMS, lanes)
            count = SUMS if name == "products" else STREAMS
            with code.loop(0, turns, step, [start] * count, kind) as loop:
                if name == "products":
                    loop.give([code.let(f"vector.fma {v}, {factor}, {start} : {kind}") for v in loop.carried])
                else:
                    read = []
                    for stream in range(STREAMS):
                        at = code.add(code.add(base, loop.index), stream * BLOCK // STREAMS)
                        ahead = code.add(at, BLOCK // 16)
                        code.line(f"memref.prefetch %x[{ahead}], read, locality<2>, data : {FLAT}")
                        read.append(code.let(f"vector.load %x[{at}] : {FLAT}, {kind}"))
                    loop.give(
                        [code.let(f"arith.addf {v}, {r} : {kind}") for v, r in zip(loop.carried, read, strict=True)]
                    )
            total = loop.results[0]
            for value in loop.results[1:]:
                total = code.let(f"arith.addf {total}, {value} : {kind}")
            code.line(f"vector.store {total}, %sums[{code.mul(item, lanes)}] : {FLAT}, {kind}")
    entry_points(code, name, arguments)
    return f"module {{\n{code.text()}\n}}\n"


@functools.cache
def _loaded(name: str) -> LoadedObject:
    return LoadedObject(compile_object(_source(name), best_level(), name))


def _seconds(name: str, x: torch.Tensor, threads: int) -> float:
    sums = torch.empty(len(x) // BLOCK * best_level().lanes)
    counters = (ctypes.c_int64 * 8)()
    arguments = Arguments([of_tensor(x), of_tensor(sums), of_memory(ctypes.addressof(counters), 8)])
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(_loaded(name).address(name))
    start = time.perf_counter()
    call(ctypes.addressof(arguments.pointers), threads)
    return time.perf_counter() - start


def gflop_s(threads: int, repeats: int = 7, items: int = 100) -> float:
    """The best of some runs of float32 fused multiply-adds."""
    x = torch.full((items * BLOCK,), 1e-3)
    flop = 2 * SUMS * best_level().lanes * TURNS * items
    return flop / min(_seconds("products", x, threads) for _ in range(repeats)) / 1e9


def read_gb_s(threads: int, repeats: int = 7, size: int = 1 << 27) -> float:
    """The best of some runs over `size` float32s."""
    x = torch.ones(size)
    return 4 * size / min(_seconds("reading", x, threads) for _ in range(repeats)) / 1e9
