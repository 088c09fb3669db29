"""What this machine is and what it can run: the facts behind `dsmoe doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dsmoe_compiler.version import __version__

TORCH_SUPPORTED = ((2, 11), (2, 14))
"""The first release that is supported and the first that is not, as in pyproject.toml."""

OPTIONAL = (
    ("triton", "GPU kernels", "comes with a CUDA build of torch"),
    ("transformers", "dsmoe compare --against hf", 'pip install "transformers>=5.17,<5.24"'),
    ("matplotlib", "plots beside the report", 'pip install "dsmoe-compiler[report]"'),
    ("onnx", "dsmoe compile --format onnx", 'pip install "dsmoe-compiler[onnx]"'),
    ("onnxscript", "dsmoe compile --format onnx", 'pip install "dsmoe-compiler[onnx]"'),
    ("onnxruntime", "proving and running ONNX on the CPU", 'pip install "dsmoe-compiler[onnx]"'),
    ("onnxruntime-gpu", "proving and running ONNX on a GPU", 'pip install "dsmoe-compiler[gpu]"'),
    ("torch-mlir", "compiling for the CPU by our own kernels", 'pip install "dsmoe-compiler[mlir]"'),
)


@dataclass(frozen=True, kw_only=True)
class Package:
    """An optional package: `version` is None where it is not installed."""

    name: str
    version: str | None
    needed_for: str
    install: str


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory_bytes: int
    capability: str


@dataclass(frozen=True, kw_only=True)
class CacheFolder:
    """A folder that compiling writes to. `private`: nobody else may write there (true as well while it is missing)."""

    what: str
    path: str
    exists: bool
    writable: bool
    private: bool


@dataclass(frozen=True, kw_only=True)
class Ability:
    """One thing a user may want to run here; `remedy` is the way out where `ok` is false."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Everything `dsmoe doctor` prints."""

    dsmoe: str
    python: str
    system: str
    cpu: str
    cores: int
    vector_isa: str
    memory_bytes: int
    torch: str
    torch_threads: int
    torch_cuda: str | None
    cxx_compiler: str | None
    gpus: tuple[Gpu, ...]
    packages: tuple[Package, ...]
    caches: tuple[CacheFolder, ...]
    abilities: tuple[Ability, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Environment:
    """Look at this machine; compiles one empty C++ file to see whether the compiler works, changes nothing."""
    packages = tuple(Package(name=n, version=package_version(n), needed_for=f, install=i) for n, f, i in OPTIONAL)
    gpus, compiler = _gpus(), _cxx_compiler()
    return Environment(
        dsmoe=__version__,
        python=platform.python_version(),
        system=platform.platform(terse=True),
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        vector_isa=torch.backends.cpu.get_cpu_capability(),
        memory_bytes=_memory_bytes(),
        torch=torch.__version__,
        torch_threads=torch.get_num_threads(),
        torch_cuda=torch.version.cuda,
        cxx_compiler=compiler,
        gpus=gpus,
        packages=packages,
        caches=(
            _cache("Inductor", "TORCHINDUCTOR_CACHE_DIR", _inductor_default()),
            _cache("Triton", "TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"),
        ),
        abilities=_abilities({package.name: package.version for package in packages}, gpus, compiler),
    )


def _abilities(packages: dict[str, str | None], gpus: tuple[Gpu, ...], compiler: str | None) -> tuple[Ability, ...]:
    supported = TORCH_SUPPORTED[0] <= _release(torch.__version__) < TORCH_SUPPORTED[1]
    low, high = (".".join(map(str, version)) for version in TORCH_SUPPORTED)
    entry_points = metadata.entry_points(group="torch_dynamo_backends")
    registered = any(entry_point.name == "dsmoe" for entry_point in entry_points)
    return (
        Ability(
            name="supported torch",
            ok=supported,
            detail=f"{torch.__version__}; supported is >={low},<{high}",
            remedy=None if supported else f'pip install "torch>={low},<{high}"',
        ),
        Ability(
            name="compile --target cpu",
            ok=supported and compiler is not None,
            detail=compiler or "no working C++ compiler",
            remedy=None if compiler else "install g++ or clang++ (Debian: apt-get install g++), or name one with CXX",
        ),
        _cuda_ability(packages["triton"], gpus, compiler),
        _onnx_ability(packages),
        _mlir_ability(packages["torch-mlir"]),
        Ability(
            name='torch.compile(backend="dsmoe")',
            ok=registered,
            detail="entry point registered" if registered else "no entry point: the package is not installed",
            remedy=None if registered else "pip install dsmoe-compiler, or pip install -e . in a clone",
        ),
        Ability(
            name="compare --against hf",
            ok=packages["transformers"] is not None,
            detail=f"transformers {packages['transformers'] or 'is not installed'}",
            remedy=None if packages["transformers"] else 'pip install "transformers>=5.17,<5.24"',
        ),
    )


def _cuda_ability(triton: str | None, gpus: tuple[Gpu, ...], compiler: str | None) -> Ability:
    remedy = None
    if torch.version.cuda is None:
        present = Path("/dev/nvidiactl").exists()
        remedy = "install a CUDA build of torch" if present else "needs an NVIDIA GPU and a CUDA build of torch"
    elif not gpus:
        remedy = f"torch is built for CUDA {torch.version.cuda} but sees no GPU: check nvidia-smi, CUDA_VISIBLE_DEVICES"
    elif triton is None:
        remedy = "pip install triton, in the version that this torch asks for"
    elif compiler is None:
        remedy = "install g++ or clang++, or name one with CXX"
    detail = ", ".join(gpu.name for gpu in gpus) or "no GPU"
    return Ability(name="compile --target cuda", ok=remedy is None, detail=detail, remedy=remedy)


def _mlir_ability(version: str | None) -> Ability:
    from dsmoe_runtime.errors import TargetError
    from dsmoe_runtime.mlir.levels import best_level

    remedy, detail = None, f"torch-mlir {version}"
    try:
        detail += f", level {best_level().name}"
    except TargetError as error:
        remedy, detail = "use another format on this processor", str(error)
    if version is None:
        remedy, detail = 'pip install "dsmoe-compiler[mlir]"', "torch-mlir is not installed"
    return Ability(name="compile --format mlir", ok=remedy is None, detail=detail, remedy=remedy)


def _onnx_ability(packages: dict[str, str | None]) -> Ability:
    runtime = packages["onnxruntime"] or packages["onnxruntime-gpu"]
    wanted = {"onnx": packages["onnx"], "onnxscript": packages["onnxscript"], "onnxruntime": runtime}
    missing = [name for name, version in wanted.items() if version is None]
    detail = f"no {', '.join(missing)}" if missing else f"onnxruntime {runtime}"
    remedy = 'pip install "dsmoe-compiler[onnx]"' if missing else None
    return Ability(name="compile --format onnx", ok=not missing, detail=detail, remedy=remedy)


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Gpu(name=p.name, memory_bytes=p.total_memory, capability=f"{p.major}.{p.minor}") for p in properties)


def _cxx_compiler() -> str | None:
    """The C++ compiler that Inductor will call, if it makes a shared library: its first line of `--version`."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path is None or not _builds(path):
            continue
        lines = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
        return lines[0] if lines else path
    return None


def _builds(compiler: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="dsmoe-doctor-") as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("#include <Python.h>\n#include <vector>\nstd::vector<int> nothing;\n")
        include = f"-I{sysconfig.get_paths()['include']}"
        command = [compiler, "-shared", "-fPIC", "-fopenmp", include, str(source), "-o", str(source.with_suffix(".so"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _inductor_default() -> Path:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return Path(default_cache_dir())


def _cache(what: str, variable: str, default: Path) -> CacheFolder:
    path = Path(os.environ.get(variable) or default)
    nearest = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    status = path.stat() if path.exists() else None
    return CacheFolder(
        what=what,
        path=str(path),
        exists=status is not None,
        writable=os.access(nearest, os.W_OK),
        private=status is None or (status.st_uid == os.getuid() and not status.st_mode & 0o022),
    )


def package_version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
