"""Builds the library that ONNX Runtime loads for dsmoe::DsMoE: one plain C++ compiler, no headers but our own.

Built on first use and kept in the user's cache, under a name that says from what: sources, compiler, its flags. The
same file runs on every processor of an architecture: which instructions it uses is decided when it runs.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsmoe_runtime.cache import cache_folder, writable_by_others
from dsmoe_runtime.errors import TargetError

FOLDER = Path(__file__).parent
SOURCES = (
    *("library.cpp", "kernel.cpp"),
    *("cpu_kernel.cpp", "cpu_machine.cpp", "cpu_plain.cpp", "cpu_avx2.cpp", "cpu_avx512.cpp"),
    *("cuda.cpp", "cuda_decode.cpp", "cuda_driver.cpp", "cuda_folder.cpp", "cuda_launch.cpp", "cuda_layer.cpp"),
    *("cuda_node.cpp", "cuda_programs.cpp"),
)
# No -march: a file compiled for one processor dies of SIGILL on another. Without the two last, GCC would keep branches
# where a vector needs none, for the sake of errno and of traps that nobody reads.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# The runtime unloads a library with the last session that uses it; this one stays, for what it has told others to call.
LINK = ("-shared", "-pthread", "-ldl", *(("-Wl,-z,nodelete",) if platform.system() == "Linux" else ()))
COMPILERS = ("c++", "g++", "clang++")
NAME = "libdsmoe_ort.so"
WITHOUT = "a portable ONNX model runs without the library too, on its function bodies"


def library() -> Path:
    """The library for this machine, built if it is not in the cache yet (seconds).

    Raises:
        TargetError: there is no C++ compiler, or it fails, or the cache is not the user's own.
    """
    command = compiler()
    path = cache_folder("ort") / _key(command) / NAME
    if others := writable_by_others(path.parent):
        raise TargetError(f"{others}; name a folder of your own with DSMOE_CACHE_DIR")
    if not path.exists():
        _build(command, path)
    return path


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, which may hold arguments, else the first of c++, g++ and clang++.

    Raises:
        TargetError: there is none.
    """
    if platform.system() == "Windows":
        raise TargetError(f"the ONNX Runtime library is built on Linux and macOS only; {WITHOUT}")
    asked = os.environ.get("CXX", "").strip()
    if asked:
        command = shlex.split(asked)
        if shutil.which(command[0]) is None:
            raise TargetError(f"CXX is {asked!r}, and there is no such program; name another or unset it")
        return command
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise TargetError(
        f"no C++ compiler to build the ONNX Runtime library with: none of {', '.join(COMPILERS)} is in PATH; "
        f"install one (Debian: apt-get install g++) or name it with CXX; {WITHOUT}"
    )


def _key(command: Sequence[str]) -> str:
    """A name for what the sources and this compiler make."""
    answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise TargetError(
            f"`{shlex.join(command)} --version` failed: {_complaint(answer.stderr)}; name another with CXX"
        )
    digest = hashlib.sha256()
    for part in (answer.stdout, platform.machine(), *command, *FLAGS, *LINK):
        digest.update(part.encode() + b"\0")
    for source in sorted(FOLDER.iterdir()):
        if source.suffix in (".cpp", ".h", ".inc"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _build(command: Sequence[str], path: Path) -> None:
    """Compile every source, link them, and put the result in place at once."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as temporary:
        folder = Path(temporary)

        def compile_one(name: str) -> Path:
            made = folder / f"{name}.o"
            _run([*command, *FLAGS, "-c", str(FOLDER / name), "-o", str(made)], f"compiling {name}")
            return made

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        linked = folder / NAME
        _run([*command, *map(str, objects), *LINK, "-o", str(linked)], "linking")
        linked.replace(path)


def _run(command: Sequence[str], doing: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise TargetError(
            f"{doing} the ONNX Runtime library failed: {_complaint(ran.stderr)} (`{shlex.join(command)}`); "
            f"name another compiler with CXX; {WITHOUT}"
        )


def _complaint(output: str) -> str:
    """What a compiler says went wrong: its first line with an error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "it says nothing")
