"""The mlir format of an artifact: object files, the text they were made of, and all that it takes to call them.

    model.json               each phase: arguments, free dimensions, results, objects by level in the order of linking
    objects/*.o              a function each; prefill_LEVEL.o and decode_LEVEL.o call the others
    model.mlir               the glue of both phases as linalg, and the programs
    weights/*.safetensors    mapped, not read: several processes share their pages
    libmodel.so, model.h     all objects as a library of C, see linking.py; library/ is its source

An object needs libgomp, libm and libc, and nothing of torch or Python. A function whose name tells no level does the
same at each of them: that of the least level is kept.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx

from dsmoe_compiler.phases import Phase
from dsmoe_compiler.targets.mlir.linking import Linked, link, write_sources
from dsmoe_compiler.targets.mlir.opening import MODEL, OBJECTS
from dsmoe_compiler.targets.mlir.program import Compiled, Objects, compiling
from dsmoe_compiler.targets.mlir.schedule import schedule
from dsmoe_compiler.targets.mlir.stages import called_by, glue_text
from dsmoe_compiler.targets.mlir.tables import entry_name
from dsmoe_compiler.targets.weights import WEIGHTS, write_weights
from dsmoe_compiler.targets.workers import Progress
from dsmoe_model.checkpoint.json_files import write_json
from dsmoe_model.transformer import Transformer
from dsmoe_runtime.mlir.attention_lowering import attention_function
from dsmoe_runtime.mlir.attention_place import AttentionSpec
from dsmoe_runtime.mlir.formats import type_of
from dsmoe_runtime.mlir.function import Function
from dsmoe_runtime.mlir.levels import LEVELS, Level, best_level, level_named
from dsmoe_runtime.mlir.linear_lowering import LinearSpec, linear_function

TEXT = "model.mlir"


def package(
    phases: Iterable[Phase], folder: Path, *, model: Transformer, levels: Sequence[str] | None, progress: Progress
) -> dict[str, Any]:
    """Compile the phases of `model` into `folder`: the manifest's entry about them. `levels` None: see `chosen`.

    LLVM begins with what such a model calls in any case, while the first phase is captured.
    Raises: TargetError.
    """
    wanted = chosen(levels)
    graphs: dict[str, fx.GraphModule] = {}
    with compiling() as pool:  # LLVM compiles one phase while the next is captured
        objects = {level.name: Objects(level, pool) for level in wanted}
        for level in wanted:
            for function in expected(model, level):
                objects[level.name].expect(function)
        jobs: dict[tuple[str, str], Callable[[], Compiled]] = {}
        for phase in phases:
            graphs[phase.name] = phase.graph
            for level in wanted:
                progress(f"{phase.name}: torch-mlir, then LLVM for {level.name}")
                plan = schedule(phase.graph, entry_name(phase.name, level), level)
                jobs[phase.name, level.name] = objects[level.name].start(plan)
        names = write_weights(graphs, folder / WEIGHTS, progress=progress)
        made = {place: result() for place, result in reversed(jobs.items())}
    compiled = {place: made[place] for place in jobs}
    plans, last = {name: compiled[name, wanted[-1].name].schedule for name in graphs}, objects[wanted[-1].name]
    texts = [glue_text(plan, last.lowered(plan, {}), called_by(plan, None), "linalg") for plan in plans.values()]
    (folder / OBJECTS).mkdir()
    images: dict[str, bytes] = {}
    for one in compiled.values():  # the least level comes first
        for name, image in one.images.items():
            images.setdefault(name, image)
    for name, image in images.items():
        (folder / OBJECTS / f"{name}.o").write_bytes(image)
    interfaces = {name: replace(compiled[name, wanted[0].name].schedule.interface(), entry=name) for name in graphs}
    described = {
        name: {
            "objects": {level.name: list(compiled[name, level.name].images) for level in wanted},
            "interface": interface.to_dict(),
            "weights": names[name],
        }
        for name, interface in interfaces.items()
    }
    write_json(folder / MODEL, {"phases": described})
    (folder / TEXT).write_text("\n// -----\n".join(texts))
    write_sources(folder, interfaces, names, wanted)
    linked = link(folder)
    say(linked, progress)
    return {
        "levels": [level.name for level in wanted],
        "seconds": {f"{name}, {level}": one.seconds for (name, level), one in compiled.items()},
        "phases": list(graphs),
        "library": linked.to_dict(),
    }


def expected(model: Transformer, level: Level) -> list[Function]:
    """What the graphs of a model call, whatever its sizes: its linear, and attention of a prompt."""
    element = type_of(model.embed_tokens.weight.dtype)
    attention = AttentionSpec(element, "causal", model.config.head_dim**-0.5, level)
    return [linear_function(LinearSpec(element, element, None, level)), attention_function(attention)]


def chosen(names: Sequence[str] | None) -> list[Level]:
    """The levels to compile for, the least first: unless named, avx2 and the best of this machine."""
    wanted = {"avx2", best_level().name} if names is None else set(names)
    return [level for name, level in LEVELS.items() if name in wanted]


def say(linked: Linked, progress: Progress) -> None:
    """Tell whether there is a library."""
    if linked.missing is None:
        progress(f"{linked.library}: linked by {linked.compiler}")
    else:
        progress(f"no libmodel.so: {linked.missing}. In the artifact's folder: {linked.command}")


def requirement(facts: dict[str, Any]) -> dict[str, Any]:
    """What a machine must be, as the manifest has it: that of the least level."""
    level = level_named(facts["levels"][0])
    return {"machine": platform.machine(), "level": level.name, "features": sorted(level.flags)}
