"""A graph compiled to object files, loaded, and called with tensors: no weight is copied.

    program = compile_program(graph, "prefill")
    logits, experts = program([ids, *keys, *values])

Objects are kept in the user's cache. A function of the waist is one of its own, which all programs share; that of the
program is kept by the text of its schedule and of its glue's graphs, so that what was compiled before is found before
torch-mlir is asked, or even imported.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from dsmoe_compiler.targets.mlir import lowering
from dsmoe_compiler.targets.mlir.interface import Interface, Result, formula, formulas
from dsmoe_compiler.targets.mlir.lowering import Glued, lower_glue
from dsmoe_compiler.targets.mlir.plan import Schedule
from dsmoe_compiler.targets.mlir.schedule import schedule
from dsmoe_runtime.mlir import cache, function
from dsmoe_runtime.mlir.compile import compile_object, compiler_version
from dsmoe_runtime.mlir.levels import Level, best_level, check_runs
from dsmoe_runtime.mlir.loader import LoadedObject


@dataclass
class Compiled:
    """A program as object files with what is needed to call it, and the seconds that each stage took.

    `images` are by function, the program's own last: those of the waist are shared with other programs.
    """

    schedule: Schedule
    level: Level
    images: dict[str, bytes]
    seconds: dict[str, float] = field(default_factory=dict)


def compile_graph(graph: fx.GraphModule, name: str, *, level: Level | None = None) -> Compiled:
    """Compile a graph to objects, that of the entry point `name` last, or find them in the cache."""
    level = level or best_level()
    with compiling() as pool:
        return Objects(level, pool).start(schedule(graph, name, level))()


@contextmanager
def compiling() -> Iterator[ThreadPoolExecutor]:
    """The one thread that compiles while the next plan is made: with more, Python, which makes it, would wait."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class Objects:
    """Compiles plans for a level, every function once, in the thread of a pool. Who waits for results takes over what
    has not begun: LLVM works outside Python's lock.
    """

    def __init__(self, level: Level, pool: ThreadPoolExecutor) -> None:
        self.level, self.pool = level, pool
        self.versions = (compiler_version(), level.cpu, level.features)
        self.jobs: dict[str, Job] = {}
        self.early: dict[str, float] = {}  # seconds of what was begun before there was a plan
        self.glued: dict[str, dict[str, Glued]] = {}

    def expect(self, one: function.Function) -> None:
        """Begin to compile a function that a plan will probably call."""
        self.function(one, self.early)

    def lowered(self, plan: Schedule, seconds: dict[str, float]) -> dict[str, Glued]:
        """The glue of a plan, lowered once."""
        if plan.name not in self.glued:
            self.glued[plan.name] = lower_all(plan, seconds)
        return self.glued[plan.name]

    def start(self, plan: Schedule) -> Callable[[], Compiled]:
        """Begin to compile; what comes back waits for the end."""
        seconds = {"schedule": plan.seconds}
        jobs = {one.name: self.function(one, seconds) for one in plan.functions.values()}
        key = "\n".join((*self.versions, torch.__version__, *lowering.VERSION, plan.key))
        jobs[plan.name] = self.job(key, lambda: program_module(plan, self.lowered(plan, seconds)), plan.name, seconds)

        def result() -> Compiled:
            made = {name: job() for name, job in reversed(jobs.items())}  # from the end that the other thread is not at
            for stage in list(self.early):
                seconds[stage] = seconds.get(stage, 0.0) + self.early.pop(stage)
            return Compiled(plan, self.level, {name: made[name] for name in jobs}, seconds)

        return result

    def function(self, one: function.Function, seconds: dict[str, float]) -> Job:
        source = function.module([one])
        return self.job("\n".join((*self.versions, source)), lambda: source, one.name, seconds)

    def job(self, key: str, source: Callable[[], str], entry: str, seconds: dict[str, float]) -> Job:
        """The object of an entry point, from the cache, from another phase or made now."""

        def make() -> bytes:
            text, start = source(), time.perf_counter()
            image = compile_object(text, self.level, entry)
            seconds["llvm"] = seconds.get("llvm", 0.0) + time.perf_counter() - start
            return image

        if key not in self.jobs:
            self.jobs[key] = Job(self.pool, lambda: cache.cached(key, make))
        return self.jobs[key]


class Job:
    """An object file in the making; a call waits for it, or makes it where nobody has begun to."""

    def __init__(self, pool: ThreadPoolExecutor, make: Callable[[], bytes]) -> None:
        self.make, self.future = make, pool.submit(make)
        self.image: bytes | None = None

    def __call__(self) -> bytes:
        if self.image is None:
            self.image = self.make() if self.future.cancel() else self.future.result()
        return self.image


def lower_all(plan: Schedule, seconds: dict[str, float]) -> dict[str, Glued]:
    """Every distinct glue at every stage."""
    glued = {name: lower_glue(graph.graph, name) for name, graph in plan.glues.items()}
    for one in glued.values():
        for stage, took in one.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + took
    return glued


def program_module(plan: Schedule, glued: dict[str, Glued]) -> str:
    """What LLVM gets: the program and its glue; the functions of the waist are compiled apart and only declared."""
    declared = [f"  func.func private @{f.name}({', '.join(f.arguments)})" for f in plan.functions.values()]
    return function.module([], "\n".join([*declared, *(g.loops for g in glued.values()), plan.text]))


class Program:
    """Loaded objects with their weights: flat inputs to flat outputs, as the graph has them; sizes may differ."""

    def __init__(self, interface: Interface, images: dict[str, bytes], weights: dict[str, Tensor]) -> None:
        self.interface = interface
        known: dict[str, int] = {}
        self._objects = []  # they hold the code
        for name, image in images.items():
            self._objects.append(LoadedObject(image, known))
            known[name] = self._objects[-1].address(name)
        entry, space = known[interface.entry], self._objects[-1].address(f"{interface.entry}_workspace")
        self._entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(entry)
        self._space = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(space)
        arguments = list(enumerate(interface.arguments))
        self.weights = {a.name: weights[a.name] for _, a in arguments if a.kind == "weight"}
        numbers = {name: number for number, name in enumerate(interface.inputs)}
        self._inputs = [(number, numbers[a.name]) for number, a in arguments if a.kind == "input"]
        self._made = [(n, formulas(a.shape), getattr(torch, a.dtype)) for n, a in arguments if a.kind == "output"]
        self._fixed = [self.weights[a.name].data_ptr() if a.kind == "weight" else 0 for _, a in arguments]
        self._results = [None if result is None else self._reader(result) for result in interface.results]

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        free = {
            one.name: int(inputs[one.input]) if one.dim is None else inputs[one.input].shape[one.dim]
            for one in self.interface.free
        }
        addresses = (ctypes.c_void_p * (len(self._fixed) + 1))(*self._fixed, 0)
        tensors: dict[int, Tensor] = {}
        for number, given in self._inputs:
            tensors[number] = tensor = inputs[given]
            addresses[number] = tensor.data_ptr()
        for number, shape, dtype in self._made:
            tensors[number] = made = torch.empty(shape(free), dtype=dtype)
            addresses[number] = made.data_ptr()
        sizes = (ctypes.c_int64 * max(len(free), 1))(*free.values())
        workspace = _workspace(self._space(sizes))
        addresses[len(self._fixed)] = workspace.data_ptr()
        self._entry(addresses, sizes)
        return [None if read is None else read(tensors, free) for read in self._results]

    def _reader(self, result: Result) -> Callable[[dict[int, Tensor], dict[str, int]], Tensor]:
        """A function that takes the result out of the arguments."""
        shape, strides, offset = formulas(result.shape), formulas(result.strides), formula(result.offset)
        argument, dtype = self.interface.arguments[result.argument], getattr(torch, result.dtype)

        def read(tensors: dict[int, Tensor], free: dict[str, int]) -> Tensor:
            whole = self.weights[argument.name] if argument.kind == "weight" else tensors[result.argument]
            whole = whole if whole.dtype == dtype else whole.view(dtype)
            return whole.as_strided(shape(free), strides(free), whole.storage_offset() + offset(free))

        return read


def _workspace(size: int) -> Tensor:
    """Memory of its own for each thread, kept and grown."""
    block: Tensor | None = getattr(_own, "block", None)
    if block is None or block.numel() < size:
        _own.block = block = torch.empty(max(size, 64), dtype=torch.uint8)
    return block


_own = threading.local()


def weights_of(graph: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that a graph holds, by their names in it."""
    names = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    found: dict[str, Any] = {name: reduce(getattr, name.split("."), graph) for name in names}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def compile_program(graph: fx.GraphModule, name: str, *, level: Level | None = None) -> Program:
    """A graph, ready to be called. Raises: TargetError, for a level that this processor has not."""
    compiled = compile_graph(graph, name, level=level)
    check_runs(compiled.level)
    return Program(compiled.schedule.interface(), compiled.images, weights_of(graph))
