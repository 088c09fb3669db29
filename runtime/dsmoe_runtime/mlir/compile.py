"""MLIR text to an x86-64 object file: the passes, LLVM's code generator, and the text of each stage on the way.

    source     what a lowering wrote            scf, memref, vector, func
    llvm       convert-*-to-llvm                the llvm dialect
    llvm_ir    translated                       LLVM's own language
    object     optimised at level 3             position-independent, for the named feature level, whatever runs here

torch-mlir brings MLIR and LLVM. It is needed to compile, and no more once the object is there.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.levels import Level

PASSES = (
    "canonicalize", "cse", "convert-vector-to-scf", "expand-strided-metadata", "lower-affine", "convert-scf-to-cf",
    "convert-vector-to-llvm{enable-x86=true}", "finalize-memref-to-llvm", "convert-math-to-llvm",
    "convert-math-to-libm",
    "convert-arith-to-llvm", "convert-index-to-llvm", "convert-func-to-llvm", "convert-cf-to-llvm",
    "reconcile-unrealized-casts", "canonicalize", "cse",
)  # fmt: skip
INSTALL = "pip install 'dsmoe-compiler[mlir]'"
_CAPSULE = b"torch_mlir.ir.Operation._CAPIPtr"


def mlir() -> Any:
    """The torch_mlir package, or an error that says what to install."""
    try:
        import torch_mlir.ir
        import torch_mlir.passmanager
        import torch_mlir.rewrite
    except ImportError as error:
        found = _installed()
        state = f"torch-mlir {found} is too old or does not load ({error})" if found else "torch-mlir is not installed"
        raise TargetError(f"{state}; the target mlir-cpu needs it to compile: {INSTALL}") from error
    return torch_mlir


def _installed() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch-mlir")
    except PackageNotFoundError:
        return None


def compiler_version() -> str:
    """Of the wheel that compiles, for the key of what it compiled; empty without one."""
    return _installed() or ""


def lower_to_llvm(source: str, level: Level) -> Any:
    """A module in the llvm dialect, its functions marked with the feature level."""
    package = mlir()
    ir = package.ir
    with ir.Context() as context, ir.Location.unknown():
        module = ir.Module.parse(source)
        package.passmanager.PassManager.parse(f"builtin.module({','.join(PASSES)})", context).run(module.operation)
        cpu = ir.StringAttr.get(level.cpu)
        named = ", ".join(f'"{feature}"' for feature in level.features.split(","))
        features = ir.Attribute.parse(f"#llvm.target_features<[{named}]>")
        for operation in module.body.operations:
            if operation.operation.name != "llvm.func" or not len(operation.regions[0].blocks):
                continue
            operation.attributes["target_cpu"] = cpu
            operation.attributes["target_features"] = features
            if _is_private(operation):
                operation.attributes["linkage"] = ir.Attribute.parse("#llvm.linkage<internal>")
                del operation.attributes["sym_visibility"]
    return module


def _is_private(operation: Any) -> bool:
    return "sym_visibility" in operation.attributes and str(operation.attributes["sym_visibility"]) == '"private"'


def stages(source: str, level: Level) -> dict[str, str]:
    """The text of every stage that has one."""
    module = lower_to_llvm(source, level)
    from torch_mlir.dialects.llvm import translate_module_to_llvmir

    return {"source": source, "llvm": str(module), "llvm_ir": translate_module_to_llvmir(module.operation)}


def compile_object(source: str, level: Level, entry: str) -> bytes:
    """The object file of a module whose entry point is `entry`."""
    module = lower_to_llvm(source, level)
    package = mlir()
    library = ctypes.CDLL(str(Path(package.__path__[0]) / "_mlir_libs" / "libTorchMLIRAggregateCAPI.so"))
    engine = _create_engine(library, module)
    try:
        library.mlirExecutionEngineLookup.restype = ctypes.c_void_p
        library.mlirExecutionEngineDumpToObjectFile.restype = None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.o"
            name = entry.encode()
            # What lies outside is given any address: this engine compiles and never runs.
            for operation in module.body.operations:
                if operation.operation.name == "llvm.func" and not len(operation.regions[0].blocks):
                    outside = operation.attributes["sym_name"].value.encode()
                    library.mlirExecutionEngineRegisterSymbol(engine, _StringRef(outside, len(outside)), 1)
            if not library.mlirExecutionEngineLookup(engine, _StringRef(name, len(name))):
                raise TargetError(f"LLVM compiled no function {entry!r}; this is a fault of the lowering")
            library.mlirExecutionEngineDumpToObjectFile(engine, _StringRef(str(path).encode(), len(str(path))))
            return path.read_bytes()
    finally:
        library.mlirExecutionEngineDestroy(engine)


class _StringRef(ctypes.Structure):
    _fields_ = (("data", ctypes.c_char_p), ("length", ctypes.c_size_t))


class _Handle(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p),)


def _create_engine(library: ctypes.CDLL, module: Any) -> _Handle:
    """mlirExecutionEngineCreate by hand: Python's binding has no argument for position-independent code."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
    capsule = module._CAPIPtr
    create = library.mlirExecutionEngineCreate
    create.restype = _Handle
    create.argtypes = (_Handle, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool)
    for function in ("mlirExecutionEngineLookup", "mlirExecutionEngineDumpToObjectFile"):
        getattr(library, function).argtypes = (_Handle, _StringRef)
    library.mlirExecutionEngineDestroy.argtypes = (_Handle,)
    library.mlirExecutionEngineRegisterSymbol.argtypes = (_Handle, _StringRef, ctypes.c_void_p)
    library.mlirExecutionEngineRegisterSymbol.restype = None
    engine: _Handle = create(_Handle(pointer(capsule, name(capsule))), 3, 0, None, True, True)
    if not engine.pointer:
        raise TargetError("LLVM refused the module; DSMOE_LOG_LEVEL=DEBUG shows its stages")
    return engine
