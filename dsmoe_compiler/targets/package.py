"""A `.pt2` package of AOTInductor: what is in it, and how it is run with weights that are not."""

from __future__ import annotations

import json
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import dsmoe_runtime.ops  # noqa: F401  registers the operators that packages call
from dsmoe_runtime.errors import ArtifactError

Program = Callable[[list[Tensor]], list[Tensor]]
# All that a package of ours holds, below its first folder.
PACKAGED = re.compile(r"data/aotinductor/model/\w[\w.-]*|archive_format|archive_version|byteorder|\.data/\w+")


def contents(file: Path) -> tuple[int, int, dict[str, int], list[str]]:
    """Of a package: distinct kernels, calls of them, calls of registered operators, names of the weights it wants."""
    with zipfile.ZipFile(file) as archive:

        def text(suffix: str) -> str:
            return "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(suffix))

        wrapper, source, nodes = (
            text(".wrapper.cpp") or text(".cpp"),
            text(".cpp"),
            text(".wrapper.json") or text("model.json"),
        )
        cubins = {name for name in archive.namelist() if name.endswith(".cubin")}
    generated = set(re.findall(r'extern "C"\s+(?:\w+\s+)?void\s+(cpp_\w+)\(', source))
    launches = len(re.findall(r"^\s+(?:cpp_\w+|call_\w+)\(.*;$", wrapper, re.MULTILINE))
    called = Counter(node["node"]["target"] for node in json.loads(nodes)["nodes"]) if nodes else Counter()
    constants = re.findall(r'constants_info_\[\d+\]\.original_fqn = "([^"]*)"', wrapper)
    return len(generated | cubins), launches, dict(called), constants


def open_package(file: Path, constants: dict[str, Tensor], device: torch.device) -> Program:
    """Load a package and lend it its weights: a function from flat inputs to flat outputs.

    Raises: ArtifactError, if it holds anything but an AOTInductor library, or cannot be loaded.
    """
    foreign = [n for n in zipfile.ZipFile(file).namelist() if not PACKAGED.fullmatch(n.partition("/")[2])]
    if foreign:
        raise ArtifactError(f"{file} holds {foreign[0][:80]!r}, which no package of ours does: refused")
    index = -1 if device.index is None else device.index
    try:
        # Not by `torch._inductor.aoti_load_package`, which compiles C++ to compare vector instructions: up to a minute.
        # Single-threaded on CUDA: no event is waited for, so that a CUDA graph can be made of a call.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", device.type == "cuda", 1, index)
        loader.load_constants(constants, False, True, True)  # not the inactive ones, all of them, lent
    except RuntimeError as error:
        raise ArtifactError(f"{file} cannot be loaded: {str(error).splitlines()[0]}") from None

    # One call at a time: a second thread would wait for the package's own lock with Python's lock in its hands, and the
    # first, once it calls a registered operator written in Python, for Python's: for ever.
    turn = threading.Lock()

    def run(inputs: list[Tensor]) -> list[Tensor]:
        assert constants is not None  # they live as long as this function
        with turn:
            return loader.boxed_run(list(inputs))  # type: ignore[no-any-return]  # it empties the list

    return run
