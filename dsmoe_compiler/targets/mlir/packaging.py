"""The mlir format of an artifact: object files, the text they were made of, and all that it takes to call them.

    model.json               each phase: arguments, free dimensions, results, the objects in the order of linking
    objects/*.o              a function each; prefill.o and decode.o call the others
    model.mlir               the glue of both phases as linalg, and the programs
    weights/*.safetensors    mapped, not read: several processes share their pages

An object needs libgomp, libm and libc, and nothing of torch or Python.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import fx

from dsmoe_compiler.phases import Phase
from dsmoe_compiler.targets.mlir.opening import MODEL, OBJECTS
from dsmoe_compiler.targets.mlir.program import Compiled, Objects
from dsmoe_compiler.targets.mlir.schedule import schedule
from dsmoe_compiler.targets.mlir.stages import show
from dsmoe_compiler.targets.weights import WEIGHTS, write_weights
from dsmoe_compiler.targets.workers import Progress
from dsmoe_model.checkpoint.json_files import write_json
from dsmoe_runtime.mlir.levels import Level, best_level

TEXT = "model.mlir"


def package(phases: Iterable[Phase], folder: Path, *, progress: Progress) -> dict[str, Any]:
    """Compile the phases into `folder`: the manifest's entry about them. Raises: TargetError."""
    level = best_level()
    graphs: dict[str, fx.GraphModule] = {}
    with Objects(level) as objects:  # LLVM compiles one phase while the next is captured
        jobs: dict[str, Callable[[], Compiled]] = {}
        for phase in phases:
            progress(f"{phase.name}: torch-mlir, then LLVM")
            graphs[phase.name] = phase.graph
            jobs[phase.name] = objects.start(schedule(phase.graph, phase.name, level))
        made = {name: result() for name, result in reversed(jobs.items())}
    compiled = {name: made[name] for name in jobs}
    texts = [show(graph, name, "linalg", level=level).text for name, graph in graphs.items()]
    (folder / OBJECTS).mkdir()
    names = write_weights(graphs, folder / WEIGHTS, progress=progress)
    described, seconds = {}, {}
    for name, one in compiled.items():
        for function, image in one.images.items():
            (folder / OBJECTS / f"{function}.o").write_bytes(image)
        interface = one.schedule.interface().to_dict()
        described[name] = {"objects": list(one.images), "interface": interface, "weights": names[name]}
        seconds[name] = one.seconds
    write_json(folder / MODEL, {"phases": described})
    (folder / TEXT).write_text("\n// -----\n".join(texts))
    return {"level": level.name, "seconds": seconds, "phases": list(compiled)}


def requirement(level: Level) -> dict[str, Any]:
    """What a machine must be, as the manifest has it."""
    return {"machine": platform.machine(), "level": level.name, "features": sorted(level.flags)}
