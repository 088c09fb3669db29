"""What the processor can do at most: float32 products a second and bytes read a second, by code of our own in a loop.

Library calls are no measure: torch's GEMM reaches half of the peak on some processors. Products: 12 sums in registers,
as many as a register tile has. Reading: sums over memory far larger than the caches, with the prefetches that the
kernels have too. Threads are those of the kernels.
"""

from __future__ import annotations

import time

import torch

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.function import Function, matrix
from dsmoe_runtime.mlir.kernel import kernel
from dsmoe_runtime.mlir.levels import best_level
from dsmoe_runtime.mlir.team import COUNTER_SPACING, COUNTERS, claimed, reset, run, team, threads_for
from dsmoe_runtime.mlir.workspace import Workspace

FLAT = matrix("f32", 1)
SUMS = 12
TURNS = 20_000  # of an item of products
BLOCK = 1 << 16  # float32s of an item of reading
STREAMS = 4  # it is read in so many places at once: one stream alone does not keep memory busy


def _function(name: str) -> Function:
    """`@name(x, sums)`: items are claimed by all threads of one region, as in the kernels."""
    code, lanes = Code(name), best_level().lanes
    kind = f"vector<{lanes}xf32>"
    arguments = [("%x", FLAT), ("%sums", FLAT)]
    shared = [*arguments, ("%counters", COUNTERS)]
    signature = ", ".join(f"{argument}: {type_}" for argument, type_ in shared)
    with code.function("work", signature), claimed(code, 0, code.div(code.dim("%x", 0, FLAT), BLOCK)) as item:
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
                loop.give([code.let(f"arith.addf {v}, {r} : {kind}") for v, r in zip(loop.carried, read, strict=True)])
        total = loop.results[0]
        for value in loop.results[1:]:
            total = code.let(f"arith.addf {total}, {value} : {kind}")
        code.line(f"vector.store {total}, %sums[{code.mul(item, lanes)}] : {FLAT}, {kind}")
    team(code, "work", shared)
    with code.public(name, ", ".join(f"{argument}: {type_}" for argument, type_ in arguments)):
        space = Workspace(code)
        space.take("%counters", "i64", COUNTER_SPACING)
        space.allocate()
        reset(code, "%counters", 1)
        run(code, "work", shared, threads_for(code, code.dim("%x", 0, FLAT)))
        space.release()
    return Function(name, code.text(), (FLAT, FLAT))


def _seconds(name: str, x: torch.Tensor, threads: int) -> float:
    sums = torch.empty(len(x) // BLOCK * best_level().lanes)
    call, before = kernel(_function(name), best_level()), torch.get_num_threads()
    torch.set_num_threads(threads)
    start = time.perf_counter()
    call([x, sums])
    seconds = time.perf_counter() - start
    torch.set_num_threads(before)
    return seconds


def gflop_s(threads: int, repeats: int = 7, items: int = 100) -> float:
    """The best of some runs of float32 fused multiply-adds."""
    x = torch.full((items * BLOCK,), 1e-3)
    flop = 2 * SUMS * best_level().lanes * TURNS * items
    return flop / min(_seconds("products", x, threads) for _ in range(repeats)) / 1e9


def read_gb_s(threads: int, repeats: int = 7, size: int = 1 << 27) -> float:
    """The best of some runs over `size` float32s."""
    x = torch.ones(size)
    return 4 * size / min(_seconds("reading", x, threads) for _ in range(repeats)) / 1e9
