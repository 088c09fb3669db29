"""The house rules that a reader of the imports can hold: floors, optional packages, file lengths, names, captions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("dsmoe_model", "dsmoe_runtime", "dsmoe_passes", "dsmoe_compiler", "benchmarks")  # from the ground up
FOLDERS = {
    "dsmoe_model": ROOT / "model" / "dsmoe_model",
    "dsmoe_runtime": ROOT / "runtime" / "dsmoe_runtime",
    "dsmoe_passes": ROOT / "passes" / "dsmoe_passes",
    "dsmoe_compiler": ROOT / "dsmoe_compiler",
    "benchmarks": ROOT / "benchmarks",
}
OPTIONAL = {"triton", "onnx", "onnxruntime", "onnxscript", "torch_mlir", "transformers", "matplotlib"}
KERNELS = FOLDERS["dsmoe_runtime"] / "kernels"  # Triton's decorators need it at the top; so these load on demand
MOST_LINES = 350

SOURCES = [(package, path) for package, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]


def label(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def imported(node: ast.AST) -> list[str]:
    """The full names of the modules that one import statement asks for, `from x import y` as x and x.y."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def executed_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement below `node` that runs when the module is imported: no function bodies, no TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from executed_at_import(child)


@pytest.mark.parametrize(("package", "path"), SOURCES, ids=label)
def test_imports_only_from_its_own_floor_and_below(package: str, path: Path) -> None:
    allowed = FLOORS[: FLOORS.index(package) + 1]
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"line {node.lineno}: imports are absolute"
        for name in imported(node):
            floor = name.partition(".")[0]
            assert floor not in FLOORS or floor in allowed, f"line {node.lineno}: {package} may not import {name}"


@pytest.mark.parametrize(("package", "path"), SOURCES, ids=label)
def test_nothing_optional_is_imported_with_the_module(package: str, path: Path) -> None:
    is_kernel = path.is_relative_to(KERNELS)
    for node in executed_at_import(ast.parse(path.read_text())):
        for name in imported(node):
            optional = name.partition(".")[0] in OPTIONAL - ({"triton"} if is_kernel else set())
            assert not optional, f"line {node.lineno}: import {name} inside the one function that needs it"
            kernel = name.startswith("dsmoe_runtime.kernels") and not is_kernel
            assert not kernel, f"line {node.lineno}: {name} imports Triton; import it inside the function"


@pytest.mark.parametrize("path", [path for package, path in SOURCES if package == "dsmoe_model"], ids=label)
def test_the_oracle_uses_no_operator_of_ours(path: Path) -> None:
    """Two independent spellings that must agree are the cheapest proof we own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert not ast.unparse(node).startswith("torch.ops.dsmoe"), f"line {node.lineno}"


@pytest.mark.parametrize("path", [path for _, path in SOURCES] + sorted((ROOT / "tests").rglob("*.py")), ids=label)
def test_a_file_has_a_caption_and_an_end(path: Path) -> None:
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= MOST_LINES, f"{lines} lines (at most {MOST_LINES}): which of its subjects wants its own file?"
    caption = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    assert caption, "the first line of a module is one sentence that would do as its caption on a map"


def registered_for_cuda() -> set[str]:
    """The names that files of ops/ give to `register_cuda`."""
    return {
        ast.literal_eval(node.args[0])
        for path in (FOLDERS["dsmoe_runtime"] / "ops").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "register_cuda"
    }


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


def test_every_kernel_carries_the_name_of_its_operator() -> None:
    """What runs dsmoe::NAME on CUDA is kernels/NAME.py's function NAME; other files there are parts of several."""
    operators = registered_for_cuda()
    assert {"route", "experts", "moe"} <= operators
    for name in operators:
        path = KERNELS / f"{name}.py"
        assert path.is_file(), f"dsmoe::{name} is registered for CUDA; its kernels belong in {label(path)}"
        assert name in [function.name for function in functions_of(path)], f"{label(path)} has no function {name}"


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=label)
def test_code_of_the_gpu_lies_apart_from_the_code_that_launches_it(path: Path) -> None:
    """kernels/device/ holds functions that Triton compiles, and no torch; the rest of kernels/ holds none."""
    on_device = path.is_relative_to(KERNELS / "device")
    for function in functions_of(path):
        decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
        jit = any(decorator.startswith(("triton.jit", "gluon.jit")) for decorator in decorators)
        assert jit == on_device, f"line {function.lineno}: {function.name}"
    for node in ast.walk(ast.parse(path.read_text())):
        for name in imported(node) if on_device else []:
            allowed = name.startswith(("triton", "dsmoe_runtime.kernels.device", "__future__"))
            assert allowed, f"line {node.lineno}: device code imports {name}"


def test_the_reader_sees_what_it_should() -> None:
    """The test above can fail: what runs at import is seen inside classes and branches, and not inside functions."""
    source = """
if True:
    import triton
class A:
    from onnx import helper
try:
    import matplotlib.pyplot
except ImportError:
    pass
def f():
    import transformers
if TYPE_CHECKING:
    import torch_mlir
"""
    names = {name for node in executed_at_import(ast.parse(source)) for name in imported(node)}
    assert names == {"triton", "onnx", "onnx.helper", "matplotlib.pyplot"}
