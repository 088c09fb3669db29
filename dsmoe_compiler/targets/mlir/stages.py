"""What a model is at each stage on its way to machine code, as text, whole or one layer of it.

    torch        each distinct piece of glue as torch-mlir imports it
    linalg       the same on tensors, fused, its results in memory of the caller
    scheduled    loops, the functions of the waist, and the program that calls them
    llvm         the llvm dialect, as LLVM's code generator gets it

For people, and for tools that take MLIR: comments tell what calls what.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import fx

from dsmoe_compiler.targets.mlir.lowering import Glued
from dsmoe_compiler.targets.mlir.plan import Schedule
from dsmoe_compiler.targets.mlir.program import lower_all
from dsmoe_compiler.targets.mlir.schedule import schedule
from dsmoe_runtime.errors import ConfigError
from dsmoe_runtime.mlir import function
from dsmoe_runtime.mlir.compile import lower_to_llvm
from dsmoe_runtime.mlir.levels import Level, best_level

STAGES = ("torch", "linalg", "scheduled", "llvm")


@dataclass(frozen=True)
class StageText:
    """One graph at one stage; `seconds` are those of every stage up to it."""

    graph: str
    stage: str
    text: str
    seconds: dict[str, float] = field(default_factory=dict)


def show(
    graph: fx.GraphModule, name: str, stage: str, *, layer: str | None = None, level: Level | None = None
) -> StageText:
    """A graph at a stage. `layer` is the path of a module, such as "model.layers.1": only what it calls is shown.

    Raises: ConfigError for a stage or a layer that there is not.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage is {stage!r}; there are {', '.join(STAGES)}")
    level = level or best_level()
    plan = schedule(graph, name, level)
    wanted = called_by(plan, layer)
    seconds = {"schedule": plan.seconds}
    glued = lower_all(plan, seconds)
    if stage in ("torch", "linalg"):
        text = glue_text(plan, glued, wanted, stage)
    else:
        source = module_of(plan, glued, wanted, whole=layer is None)
        text = f"{calls(plan, wanted)}\n{source}"
        if stage == "llvm":
            start = time.perf_counter()
            text = str(lower_to_llvm(source, level))
            seconds["llvm"] = time.perf_counter() - start
    past = {"torch": ("linalg", "scheduled"), "linalg": ("scheduled",)}.get(stage, ())
    return StageText(name, stage, text, {key: value for key, value in seconds.items() if key not in past})


def glue_text(plan: Schedule, glued: dict[str, Glued], wanted: set[str], stage: str) -> str:
    """The glue at a stage of its own, torch or linalg, under a comment that says what is called from where."""
    texts = [f"// {heading(plan, one)}\n{getattr(glued[one], stage)}" for one in glued if one in wanted]
    return "\n".join([calls(plan, wanted), *texts])


def called_by(plan: Schedule, layer: str | None) -> set[str]:
    """The names of what a layer calls; None: of all there is."""
    if layer is None:
        return {*plan.glues, *plan.functions}
    if layer not in plan.layers:
        known = sorted(path for path in plan.layers if path.rpartition(".")[2].isdigit())
        raise ConfigError(f"no layer is called {layer!r}; there are {', '.join(known) or 'none'}")
    return plan.layers[layer]


def module_of(plan: Schedule, glued: dict[str, Glued], wanted: set[str], *, whole: bool) -> str:
    """Loops and functions as one module; `whole` with the program itself."""
    functions = [one for name, one in plan.functions.items() if name in wanted]
    loops = [one.loops for name, one in glued.items() if name in wanted]
    return function.module(functions, "\n".join([*loops, *([plan.text] if whole else [])]))


def calls(plan: Schedule, wanted: set[str]) -> str:
    """A comment: what is called from where."""
    return "\n".join(f"// {heading(plan, name)}" for name in (*plan.glues, *plan.functions) if name in wanted)


def heading(plan: Schedule, name: str) -> str:
    """`name: the innermost modules that call it`."""
    paths = [path for path, names in plan.layers.items() if name in names and path]
    inner = [path for path in paths if not any(other.startswith(path + ".") for other in paths)]
    shown = ", ".join(inner[:4]) + (f" and {len(inner) - 4} more" if len(inner) > 4 else "")
    return f"{name}: {shown or 'the graph itself'}"
