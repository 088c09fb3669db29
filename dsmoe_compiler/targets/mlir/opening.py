"""Opens an artifact of the mlir format: weights mapped, objects linked, a runner over both phases.

Nothing is compiled, and torch-mlir is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_compiler.runner import Runner, Shapes
from dsmoe_compiler.targets import package, processor
from dsmoe_compiler.targets.mlir.interface import Interface
from dsmoe_compiler.targets.mlir.program import Program
from dsmoe_compiler.targets.weights import WEIGHTS
from dsmoe_model.checkpoint import Tokenizer
from dsmoe_model.checkpoint.json_files import read_json
from dsmoe_model.checkpoint.shards import DTYPES, read_header
from dsmoe_runtime.errors import ArtifactError
from dsmoe_runtime.mlir.levels import LEVELS, cpu_flags

MODEL, OBJECTS = "model.json", "objects"
LIMIT = 64 * 2**20  # bytes of model.json
PHASES = ("prefill", "decode")
Inside = Callable[[Path, str], Path]


def open_mlir(
    folder: Path,
    manifest: dict[str, Any],
    seen: tuple[int, Shapes],
    tokenizer: Tokenizer | None,
    device: torch.device | str | None,
    inside: Inside,
    level: str | None = None,
) -> Runner:
    """`level` None: the best one that runs here. Raises: ArtifactError, if something does not fit, or this machine."""
    place = torch.device(device or "cpu")
    if place.type != "cpu":
        raise ArtifactError(f"{folder} was compiled for cpu; it cannot run on {place}")
    programs: dict[str, package.Program] = {**open_programs(folder, manifest, inside, level)}
    return Runner(*seen, manifest=manifest, tokenizer=tokenizer, programs=programs, device=place)


def open_programs(
    folder: Path, manifest: dict[str, Any], inside: Inside, level: str | None = None
) -> dict[str, Program]:
    """The phases of an artifact, loaded; `inside` is how a file of it is named safely. Raises: ArtifactError."""
    why = processor.missing(manifest["processor"])
    if why:
        raise ArtifactError(f"{folder} cannot run here: {why}. Compile it again on this machine")
    described = read_json(inside(folder, MODEL), limit=LIMIT)
    level = level or runnable(folder, manifest)[-1]
    stored: dict[str, Tensor] = {}
    for file in sorted((folder / WEIGHTS).iterdir()):
        stored |= mapped_weights(inside(folder, f"{WEIGHTS}/{file.name}"))
    programs = {}
    for phase in PHASES:
        try:
            said = described["phases"][phase]
            interface = replace(Interface.from_dict(said["interface"]), entry=f"{phase}_{level}")
            objects = said["objects"][level]
            images = {name: inside(folder, f"{OBJECTS}/{name}.o").read_bytes() for name in objects}
            weights = {own: stored[name] for own, name in said["weights"].items()}
            programs[phase] = Program(interface, images, checked(interface, weights))
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{folder} is damaged: {MODEL} lacks {error} of phase {phase}") from None
    return programs


def runnable(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """The levels of an artifact that this processor can run, the best one last. Raises: ArtifactError."""
    try:
        named = [LEVELS[name] for name in manifest["mlir"]["levels"]]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{folder} is damaged: its manifest tells no levels ({error})") from None
    fitting = [level.name for level in named if level.flags <= cpu_flags()]
    if not fitting:
        held = ", ".join(level.name for level in named)
        raise ArtifactError(f"{folder} cannot run here: it holds {held or 'no level'}, and this CPU has less")
    return fitting


def checked(interface: Interface, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, if they are what the program was compiled for. Raises: ArtifactError."""
    for argument in interface.arguments:
        if argument.kind != "weight":
            continue
        tensor = weights[argument.name]
        count = 1
        for size in argument.shape:
            count *= int(size)
        if str(tensor.dtype).removeprefix("torch.") != argument.dtype or tensor.numel() != count:
            raise ArtifactError(
                f"the weight {argument.name} is {tensor.dtype} {list(tensor.shape)}; the program wants "
                f"{argument.dtype} {list(argument.shape)}"
            )
    return weights


def mapped_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file in memory that is the file: pages are read when they are wanted."""
    whole = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    tensors = {}
    for entry in read_header(file).values():
        dtype = DTYPES[entry.dtype]
        part = whole[entry.offset : entry.offset + entry.nbytes]
        # A tensor may begin where its type may not, after others of narrower types.
        part = part if entry.offset % dtype.itemsize == 0 else part.clone()
        tensors[entry.name] = part.view(dtype).view(entry.shape)
    return tensors
