"""One parallel region for a whole operator, on the OpenMP threads that torch has already: fork once, claim work, join.

    @operator(...):   GOMP_parallel(team, data, threads)                     data: the descriptors of all arguments
    team(data):       for each phase:  while (item = phase.counter++) < items: work(item);   GOMP_barrier()

Items are claimed, not dealt: a thread that another process holds up takes fewer. Which thread does an item does not
change the item's numbers. Work for one thread alone is called without a region.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dsmoe_runtime.mlir.code import Code, Value

COUNTER_SPACING = 8  # int64s: a cache line for each counter
COUNTERS = "memref<?xi64>"
SMALL = 1 << 17  # products of two numbers: fewer are done before other threads would have begun

Arguments = Sequence[tuple[str, str]]  # name and type of each: memrefs, indices, float32s


def claim(code: Code, counter: int) -> str:
    """The number that the counter had, as an index; one more for whoever asks next."""
    where = code.index(counter * COUNTER_SPACING)
    one = code.let("arith.constant 1 : i64", "k")
    number = code.let(f"memref.atomic_rmw addi {one}, %counters[{where}] : (i64, {COUNTERS}) -> i64")
    return code.let(f"arith.index_cast {number} : i64 to index")


def reset(code: Code, counters: str, count: int) -> None:
    """All counters to 0, before the region."""
    zero = code.let("arith.constant 0 : i64", "k")
    for counter in range(count):
        code.line(f"memref.store {zero}, {counters}[{code.index(counter * COUNTER_SPACING)}] : {COUNTERS}")


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
    """All threads have come here; where there is no region, nothing happens."""
    code.line("llvm.call @GOMP_barrier() : () -> ()")


def threads_for(code: Code, products: str, most: Value | None = None) -> str:
    """How many threads OpenMP gives, as an index; one where there are few products to share, and `most` at most."""
    given = code.let("llvm.call @omp_get_max_threads() : () -> i32")
    threads = code.let(f"arith.index_cast {given} : i32 to index")
    if most is not None:
        threads = code.least(threads, most)
    return code.select(code.compare("ult", products, SMALL), 1, code.most(threads, 1))


def descriptor(kind: str) -> str:
    """What lies in memory for a value of a type: the LLVM struct of a memref, or a number."""
    if not kind.startswith("memref"):
        return {"index": "i64"}.get(kind, kind)
    rank = kind.partition(",")[0].count("?")
    return f"!llvm.struct<(ptr, ptr, i64, array<{rank} x i64>, array<{rank} x i64>)>"


def _words(kind: str) -> int:
    return 3 + 2 * kind.partition(",")[0].count("?") if kind.startswith("memref") else 1


def team(code: Code, work: str, arguments: Arguments) -> None:
    """Write `@team(data)`, which calls `@work(arguments)` with what `run` left at `data`."""
    code.functions.add("team")
    with code.region("llvm.func internal @team(%data: !llvm.ptr)"):
        values, place = [], 0
        for _, kind in arguments:
            struct = descriptor(kind)
            slot = code.let(f"llvm.getelementptr %data[{place}] : (!llvm.ptr) -> !llvm.ptr, i64")
            loaded = code.let(f"llvm.load {slot} : !llvm.ptr -> {struct}")
            cast = f"builtin.unrealized_conversion_cast {loaded} : {struct} to {kind}"
            values.append(loaded if struct == kind else code.let(cast))
            place += _words(kind)
        code.line(f"func.call @{work}({', '.join(values)}) : ({', '.join(kind for _, kind in arguments)}) -> ()")
        code.line("llvm.return")


def run(code: Code, work: str, arguments: Arguments, threads: str) -> None:
    """Call `@work` with the values that have the arguments' names here, on so many threads at once."""
    names, kinds = ", ".join(name for name, _ in arguments), ", ".join(kind for _, kind in arguments)
    with code.region(f"scf.if {code.compare('eq', threads, 1)}", tail=None):
        code.line(f"func.call @{work}({names}) : ({kinds}) -> ()")
    with code.region("} else"):
        size = code.let(f"llvm.mlir.constant({sum(_words(kind) for _, kind in arguments)} : i64) : i64")
        data = code.let(f"llvm.alloca {size} x i64 : (i64) -> !llvm.ptr")
        place = 0
        for name, kind in arguments:
            struct = descriptor(kind)
            value = name
            if struct != kind:
                value = code.let(f"builtin.unrealized_conversion_cast {name} : {kind} to {struct}")
            slot = code.let(f"llvm.getelementptr {data}[{place}] : (!llvm.ptr) -> !llvm.ptr, i64")
            code.line(f"llvm.store {value}, {slot} : {struct}, !llvm.ptr")
            place += _words(kind)
        flags = code.let("llvm.mlir.constant(0 : i32) : i32")
        count = code.let(f"arith.index_cast {threads} : index to i32")
        start = code.let("llvm.mlir.addressof @team : !llvm.ptr")
        code.line(
            f"llvm.call @GOMP_parallel({start}, {data}, {count}, {flags}) : (!llvm.ptr, !llvm.ptr, i32, i32) -> ()"
        )
