"""One parallel region for a whole layer, on the OpenMP threads that torch has already: fork once, claim work, join.

    experts(data, threads):  sort;  GOMP_parallel(team, data, threads)
    team(data):              for each phase:  while (item = phase.counter++) < items: work(item);   GOMP_barrier()

`data` is an array of pointers to memref descriptors, one for each argument. Items are claimed, not dealt: a thread that
another process holds up takes fewer. Which thread does an item does not change the item's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dsmoe_runtime.mlir.code import Code, Value

COUNTER_SPACING = 8  # int64s: a cache line for each counter
COUNTERS = "memref<?xi64>"
EXTERNAL = (
    "llvm.func @GOMP_parallel(!llvm.ptr, !llvm.ptr, i32, i32)\n  llvm.func @GOMP_barrier()"  # of torch's own libgomp
)


def claim(code: Code, counter: int) -> str:
    """The number that the counter had, as an index; one more for whoever asks next."""
    where = code.index(counter * COUNTER_SPACING)
    one = code.let("arith.constant 1 : i64", "k")
    number = code.let(f"memref.atomic_rmw addi {one}, %counters[{where}] : (i64, {COUNTERS}) -> i64")
    return code.let(f"arith.index_cast {number} : i64 to index")


@contextmanager
def claimed(code: Code, counter: int, items: Value) -> Iterator[str]:
    """The block is run for items of [0, `items`) until there are no more, by whichever thread is free."""
    total = code.index(items)
    index = code.name("item")
    with code.region(f"{code.name('last')} = scf.while : () -> index", tail=None):
        number = claim(code, counter)
        code.line(f"scf.condition({code.compare('slt', number, total)}) {number} : index")
    with code.region("} do"):
        code.line(f"^bb0({index}: index):")
        yield index
        code.line("scf.yield")


def barrier(code: Code) -> None:
    """All threads have come here."""
    code.line("llvm.call @GOMP_barrier() : () -> ()")


def descriptor(kind: str) -> str:
    """The LLVM struct of a memref type."""
    rank = kind.partition(",")[0].count("?")
    return f"!llvm.struct<(ptr, ptr, i64, array<{rank} x i64>, array<{rank} x i64>)>"


def entry_points(code: Code, name: str, arguments: Sequence[tuple[str, str]]) -> None:
    """Write `@name(data, threads)`, which calls `@prepare` and then `@work` on every thread of a region."""

    def call(function: str) -> None:
        values = []
        for position, (_, kind) in enumerate(arguments):
            struct = descriptor(kind)
            slot = code.let(f"llvm.getelementptr %data[{position}] : (!llvm.ptr) -> !llvm.ptr, !llvm.ptr")
            pointer = code.let(f"llvm.load {slot} : !llvm.ptr -> !llvm.ptr")
            loaded = code.let(f"llvm.load {pointer} : !llvm.ptr -> {struct}")
            values.append(code.let(f"builtin.unrealized_conversion_cast {loaded} : {struct} to {kind}"))
        kinds = ", ".join(kind for _, kind in arguments)
        code.line(f"func.call @{function}({', '.join(values)}) : ({kinds}) -> ()")

    with code.region("llvm.func internal @team(%data: !llvm.ptr)"):
        call("work")
        code.line("llvm.return")
    with code.region(f"llvm.func @{name}(%data: !llvm.ptr, %threads: i32)"):
        call("prepare")
        flags = code.let("llvm.mlir.constant(0 : i32) : i32")
        team = code.let("llvm.mlir.addressof @team : !llvm.ptr")
        code.line(
            f"llvm.call @GOMP_parallel({team}, %data, %threads, {flags}) : (!llvm.ptr, !llvm.ptr, i32, i32) -> ()"
        )
        code.line("llvm.return")
