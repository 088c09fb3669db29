"""AOTInductor: each phase becomes a native library in a `.pt2`, and all phases share one set of weights beside it.

The weights are not in the packages: they are written once, and lent to each loaded package by reference. On the CPU
`dsmoe::` operators stay calls to the registered operators ("proxy executor"), so that a package runs where
`dsmoe_runtime.ops` is imported and uses the kernel that is registered there. On CUDA they become their Triton kernels
(`lower`), whose binaries are in the package; it then runs without Python.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import fx

import dsmoe_runtime.ops  # noqa: F401  registers the operators
from dsmoe_compiler.phases import Phase
from dsmoe_compiler.targets import one_token, processor
from dsmoe_compiler.targets.elf import plain_stack
from dsmoe_compiler.targets.lower import Kept, analysed, check_lowered, copied, lower
from dsmoe_compiler.targets.package import contents
from dsmoe_compiler.targets.weights import WEIGHTS, write_weights
from dsmoe_compiler.targets.workers import Job, Progress, WorkerError, Workers, can_fork, describe
from dsmoe_runtime.errors import TargetError

log = logging.getLogger(__name__)

# What Inductor is told. The wrapper is C++ that only calls kernels: for 28 layers g++ takes 30 s at the default, -O1,
# 18 s at -Og and 15 s at -O0; a call of an 8-layer toy takes 351, 385 and over 490 us. Few horizontal-fusion attempts
# per shared buffer are enough: all layers read the same mask and rotary tables, and trying every pair of their readers
# is quadratic in the number of layers.
OPTIONS: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.compile_wrapper_opt_level": "Og",
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
    "max_fusion_buffer_group_pairwise_attempts": 4,
}
# On the CPU each phase has a worker of its own. On CUDA Inductor's workers compile kernels side by side; the C++ has no
# loops worth vector instructions, which Inductor would find out about by compiling a test for each kind.
OF_TARGET: dict[str, dict[str, Any]] = {"cpu": {"compile_threads": 1}, "cuda": {"cpp.vec_isa_ok": False}}
INDISPENSABLE = ("aot_inductor.package", "aot_inductor.package_constants_in_so")


@dataclass(frozen=True)
class PhaseReport:
    """One package: `kernels` distinct generated kernels, called `launches` times, and calls of registered operators.

    `constants` maps the package's own names for its weights to names in `weights/`.
    """

    file: str
    seconds: float
    bytes: int
    kernels: int
    launches: int
    operators: dict[str, int]
    constants: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def package(phases: Iterable[Phase], folder: Path, *, target: str, progress: Progress) -> dict[str, PhaseReport]:
    """Compile each phase to `folder/NAME.pt2` and write `folder/weights/*.safetensors`: phase name -> report.

    `phases` may be a generator: on the CPU a phase is compiled in a worker while the next one is still being captured.
    On CUDA they are compiled here, one after the other.

    Raises: TargetError, with the compiler's words, when a phase cannot be compiled.
    """
    level = processor.architecture()
    options = accepted(OPTIONS | OF_TARGET[target] | ({"cpp.march": level} if level else {}))
    graphs: dict[str, fx.GraphModule] = {}
    outcome: dict[str, Any] = {}
    apart = target == "cpu" and can_fork()
    with Workers(progress) as workers:
        try:
            if apart and not prepared(options).exists():
                workers.start("headers", lambda say: prepare(folder, options, say))
            for phase in phases:
                graphs[phase.name] = phase.graph

                def job(say: Progress, phase: Phase = phase) -> Any:
                    return compile_phase(phase, folder, options, say, on_cuda=target == "cuda")

                if apart:
                    workers.start(phase.name, job)
                    workers.hear(timeout=0.0)
                else:
                    outcome[phase.name] = here(phase.name, job, progress)
            names = write_weights(graphs, folder / WEIGHTS, progress=progress)
            outcome |= workers.results(graphs) if apart else {}
        except WorkerError as error:
            raise TargetError(f"AOTInductor, {error}") from error.__cause__
    reports = {}
    for name, (seconds, *counts) in outcome.items():
        file = folder / f"{name}.pt2"
        kernels, launches, operators, constants = counts
        unknown = [fqn for fqn in constants if fqn not in names[name]]
        if unknown:
            raise TargetError(f"{file.name} wants the constant {unknown[0]!r}, which the graph does not have")
        stored = {fqn: names[name][fqn] for fqn in constants}
        reports[name] = PhaseReport(file.name, seconds, file.stat().st_size, kernels, launches, operators, stored)
    return reports


def here(name: str, job: Job, progress: Progress) -> Any:
    """Run a worker's job in this process. Raises: WorkerError, as a worker would."""
    try:
        return job(lambda message: progress(f"{name}: {message}"))
    except TargetError:
        raise
    except Exception as error:
        raise WorkerError(f"{name} failed: {describe(error)}") from error


def accepted(options: dict[str, Any]) -> dict[str, Any]:
    """`options` without what this torch does not know. Raises: TargetError, if an indispensable one is among it."""
    import torch._inductor.config as inductor

    known = {}
    for name, value in options.items():
        try:
            reduce(getattr, name.split("."), inductor)
        except AttributeError:
            if name in INDISPENSABLE:
                raise TargetError(
                    f"torch {torch.__version__} has no inductor option {name}: use torch 2.11 to 2.13"
                ) from None
            log.info("torch %s has no inductor option %s: left out", torch.__version__, name)
            continue
        known[name] = value
    return known


def prepare(folder: Path, options: dict[str, Any], say: Progress) -> None:
    """Compile next to nothing, so that Inductor precompiles its C++ headers while the model is still being captured.

    It does so once per user, torch and set of options, and takes about as long as compiling a small model.
    """
    x = torch.ones(64)
    graph = fx.Graph()
    place = graph.placeholder("x")
    place.meta["val"] = x
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (place, 1)),))
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as build:
        say("precompiling")
        try:
            library(Phase("headers", fx.GraphModule(torch.nn.Module(), graph), (x,)), Path(build), options)
            prepared(options).touch()
        except Exception as error:  # no result is lost: the phases will fail in the same way, and say so
            say(f"not precompiled: {describe(error)}")


def prepared(options: dict[str, Any]) -> Path:
    """A mark beside Inductor's precompiled headers that those for `options` are there."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    key = hashlib.sha256(repr((torch.__version__, sorted(options.items()))).encode()).hexdigest()
    return Path(default_cache_dir()) / "precompiled_headers" / f"dsmoe-{key[:16]}"


def library(phase: Phase, build: Path, options: dict[str, Any]) -> list[str]:
    """Compile a graph into `build`: the files that make a package."""
    from torch._inductor import aot_compile

    with torch.no_grad(), analysed(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # torch 2.13 on its own pytree
        options = options | {"aot_inductor.output_path": str(build.resolve())}
        return aot_compile(phase.graph, phase.inputs, options=options)  # type: ignore[return-value]


def compile_phase(
    phase: Phase, folder: Path, options: dict[str, Any], say: Progress, *, on_cuda: bool = False
) -> tuple[Any, ...]:
    """Write one package and return what `PhaseReport` says about it."""
    from torch._inductor.package import package_aoti

    start = time.perf_counter()
    kept: list[Kept] = []
    if on_cuda:
        graph = copied(phase.graph)
        one_token.prepare(graph, phase.inputs)
        kept = lower(graph)
        phase = replace(phase, graph=graph)
        options = options | accepted(one_token.options_for(phase.inputs))
    for operator, reason in sorted({(call.operator, call.reason) for call in kept}):
        log.warning("%s: %s stays a call, and the package needs Python for it: %s", phase.name, operator, reason)
    build, file = folder / f".build-{phase.name}", folder / f"{phase.name}.pt2"
    say(f"lowering {len(phase.graph.graph.nodes)} nodes, then g++")
    try:
        files = library(phase, build, options)
        for path in files:
            if isinstance(path, str) and path.endswith(".so"):
                plain_stack(Path(path))
        package_aoti(str(file), files)  # type: ignore[arg-type]
    finally:
        shutil.rmtree(build, ignore_errors=True)
    seconds = time.perf_counter() - start
    kernels, launches, operators, constants = contents(file)
    if on_cuda:
        check_lowered(file.name, operators, kept)
    say(f"{kernels} kernels, {file.stat().st_size / 2**20:.1f} MB in {seconds:.0f} s")
    return seconds, kernels, launches, operators, constants


def requirement(target: str) -> dict[str, Any]:
    """What a machine must be to run what is compiled here now, as the manifest has it."""
    host = processor.requirement(processor.architecture() if pinned() else None)
    if target == "cuda":
        gpu = {"name": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
        return gpu | {"host": host}
    return host


def unfit(target: str, required: dict[str, Any], device: torch.device) -> str | None:
    """Why this machine cannot run a package with that requirement, or None."""
    if target == "cuda":
        here = list(torch.cuda.get_device_capability(device))
        there = required.get("capability")
        if here != there:
            return f"it is compiled for CUDA capability {there}, this GPU has {here}"
        required = required["host"]
    return processor.missing(required)


def pinned() -> bool:
    """Whether this torch lets us name the processor to compile for; else it is this very one."""
    return bool(accepted({"cpp.march": None}))
