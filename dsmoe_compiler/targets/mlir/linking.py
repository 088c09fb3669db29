"""libmodel.so: the objects of an artifact and a little C, linked by the machine's plain C compiler.

    cc -shared ... library/*.c objects/*.o -lgomp -lm -o libmodel.so

It needs libgomp, libm and libc, holds no text relocations, and exports the functions of model.h alone. Where there is
no C compiler the artifact is written without it: sources and objects are there, and the manifest says how to link them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsmoe_compiler.targets.mlir.interface import Interface
from dsmoe_compiler.targets.mlir.opening import OBJECTS
from dsmoe_compiler.targets.mlir.tables import tables
from dsmoe_compiler.targets.weights import WEIGHTS
from dsmoe_runtime.mlir.levels import Level

LIBRARY, HEADER, SOURCES, TABLES, EXPORTS = "libmodel.so", "model.h", "library", "tables.c", "exports.map"
FIXED = Path(__file__).parent / "library"
COMPILERS = ("cc", "gcc", "clang")
# No -march: what a processor can do is asked when a model is opened. `-z text` refuses text relocations.
FLAGS = ("-std=c11", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-I.",
         f"-Wl,--version-script={SOURCES}/{EXPORTS}", "-Wl,-z,text,-z,defs,-z,relro,-z,now,-z,noexecstack")  # fmt: skip
LIBRARIES = ("-lgomp", "-lm")


@dataclass(frozen=True)
class Linked:
    """What came of it: `missing` says why there is no library, and `command` how to make it in the folder."""

    library: str | None
    compiler: str
    command: str
    missing: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def write_sources(
    folder: Path, interfaces: Mapping[str, Interface], names: Mapping[str, Mapping[str, str]], levels: Sequence[Level]
) -> None:
    """model.h and library/: all that is linked with the objects. Raises: TargetError."""
    (folder / SOURCES).mkdir()
    for file in sorted(FIXED.iterdir()):
        shutil.copyfile(file, folder / (HEADER if file.name == HEADER else f"{SOURCES}/{file.name}"))
    weights = sorted((folder / WEIGHTS).iterdir())
    (folder / SOURCES / TABLES).write_text(tables(interfaces, names, weights, levels))


def link(folder: Path) -> Linked:
    """Link the library, if this machine can."""
    sources = sorted(f"{SOURCES}/{file.name}" for file in (folder / SOURCES).glob("*.c"))
    objects = sorted(f"{OBJECTS}/{file.name}" for file in (folder / OBJECTS).glob("*.o"))
    found = compiler()
    command = [*(found or ["cc"]), *FLAGS, *sources, *objects, *LIBRARIES, "-o", LIBRARY]
    # The folder itself holds what its manifest lists, and nothing else.
    wild = f"{SOURCES}/*.c {OBJECTS}/*.o {' '.join(LIBRARIES)} -o ../{LIBRARY}"
    by_hand = f"{shlex.join([*(found or ['cc']), *FLAGS])} {wild}"
    if found is None:
        asked = os.environ.get("CC", "").strip()
        none = f"CC is {asked!r}, and there is no such program" if asked else f"{', '.join(COMPILERS)} are not in PATH"
        return Linked(None, "", by_hand, f"no C compiler: {none}; install gcc, or name one with CC")
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        code, complaint = ran.returncode, ran.stderr.strip().splitlines() or ["it said nothing"]
    except OSError as error:
        code, complaint = -1, [str(error)]
    if code:
        (folder / LIBRARY).unlink(missing_ok=True)
        reason = next((line for line in complaint if "error" in line or "cannot find" in line), complaint[0])
        why = f"{shlex.join(found)} ended with {code} instead of linking it: {reason[:300]}"
        return Linked(None, shlex.join(found), by_hand, why)
    return Linked(LIBRARY, shlex.join(found), by_hand)


def compiler() -> list[str] | None:
    """The command of the C compiler: $CC, which may hold arguments, else the first of cc, gcc and clang."""
    asked = shlex.split(os.environ.get("CC", ""))
    if asked:
        return asked if shutil.which(asked[0]) else None
    return next(([name] for name in COMPILERS if shutil.which(name)), None)
