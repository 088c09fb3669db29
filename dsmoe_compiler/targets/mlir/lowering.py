"""Glue through torch-mlir: torch dialect -> linalg on tensors -> loops.

    func.func @glue(%x: !torch.vtensor<[1,?,256],f32>) -> !torch.vtensor<[1,?,256],f32>      torch
    func.func @glue(%x: tensor<1x?x256xf32>, %out: memref<1x?x256xf32>)                      linalg
      bufferization.materialize_in_destination %y in restrict writable %out
    func.func private @glue(%x: memref<1x?x256xf32>, %out: memref<1x?x256xf32>)              scheduled

Results are written into memory of the caller, which is why linalg knows of it.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from torch import fx

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.compile import mlir

TO_TORCH_BACKEND = "builtin.module(torchdynamo-export-to-torch-backend-pipeline)"
TO_LINALG = "builtin.module(torch-backend-to-linalg-on-tensors-backend-pipeline)"
FUSED = (
    "builtin.module(func.func(refback-generalize-tensor-pad,refback-generalize-tensor-concat,"
    "linalg-generalize-named-ops),canonicalize,cse,func.func(linalg-fuse-elementwise-ops),canonicalize,cse)"
)
TO_LOOPS = (
    "builtin.module(func.func(math-extend-to-supported-types{target-type=f32},"
    "arith-emulate-unsupported-floats{source-types=bf16,f16 target-type=f32}),eliminate-empty-tensors,"
    "one-shot-bufferize{bufferize-function-boundaries=1 function-boundary-type-conversion=identity-layout-map},"
    "canonicalize,cse,buffer-deallocation-pipeline,convert-bufferization-to-memref,"
    "func.func(refback-munge-memref-copy,convert-linalg-to-loops),canonicalize,cse,"
    "func.func(arith-expand{include-bf16=true}),canonicalize,cse)"
)
VERSION = (TO_TORCH_BACKEND, TO_LINALG, FUSED, TO_LOOPS, "1")  # of this file, for the key of what is compiled


@dataclass
class Glued:
    """The text of one function at each stage, and the seconds that each took to make."""

    torch: str
    linalg: str
    loops: str
    seconds: dict[str, float]


def lower_glue(graph: fx.Graph, name: str) -> Glued:
    """Lower a graph of `glue.py` to loops. Raises: TargetError, naming what torch-mlir cannot express."""
    package = mlir()
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.extras.fx_importer import FxImporter

    ir = package.ir
    context, seconds, start = ir.Context(), {}, time.perf_counter()
    torch_dialect.register_dialect(context)
    context.emit_error_diagnostics = False

    def run(passes: str, what: str) -> None:
        try:
            with context:
                package.passmanager.PassManager.parse(passes, context).run(module.operation)
        except Exception as error:
            raise TargetError(f"torch-mlir cannot lower {what}: {_reason(error)}\n{_operators(graph)}") from None

    def lap(stage: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[stage], start = now - start, now

    importer = FxImporter(context=context)
    try:
        importer.import_stateless_graph(graph, func_name=name)
    except Exception as error:
        raise TargetError(f"torch-mlir cannot import a part of the graph: {error}\n{_operators(graph)}") from None
    module = importer.module
    text = str(module)
    with context:
        module.body.operations[0].attributes["torch.assume_strict_symbolic_shapes"] = ir.UnitAttr.get()
    run(TO_TORCH_BACKEND, "torch operators to its own")
    lap("torch")
    run(TO_LINALG, "torch operators to linalg")
    run(FUSED, "linalg")
    _into_destinations(ir, context, module)
    linalg = str(module)
    lap("linalg")
    run(TO_LOOPS, "linalg to loops")
    loops = _private(str(module), name)
    lap("scheduled")
    return Glued(text, linalg, loops, seconds)


def _into_destinations(ir: Any, context: Any, module: Any) -> None:
    """Results become arguments: memory of the caller, at the end."""
    with context, ir.Location.unknown():
        function = module.body.operations[len(module.body.operations) - 1]
        block = function.regions[0].blocks[0]
        leave = block.operations[len(block.operations) - 1]
        values = list(leave.operands)
        kinds = [ir.RankedTensorType(value.type) for value in values]
        places = [
            block.add_argument(ir.MemRefType.get(kind.shape, kind.element_type), ir.Location.unknown())
            for kind in kinds
        ]
        with ir.InsertionPoint(leave):
            for value, place in zip(values, places, strict=True):
                marks = {"restrict": ir.UnitAttr.get(), "writable": ir.UnitAttr.get()}
                ir.Operation.create(
                    "bufferization.materialize_in_destination", operands=[value, place], attributes=marks
                )
            ir.Operation.create("func.return")
        leave.operation.erase()
        kind = ir.FunctionType.get([argument.type for argument in block.arguments], [])
        function.attributes["function_type"] = ir.TypeAttr.get(kind)
        module.operation.verify()


def _private(text: str, name: str) -> str:
    """The module's content, ready to be pasted: names of its own, sums that may be taken in any order."""
    lines = text.strip().splitlines()
    aliases = [line for line in lines if re.match(r"#\w+ =", line)]
    body = "\n".join(lines[lines.index(next(line for line in lines if line.startswith("module"))) + 1 : -1])
    for alias in reversed(aliases):
        short, _, long = alias.partition(" = ")
        body = re.sub(rf"{re.escape(short)}\b", long.replace("\\", r"\\"), body)
    for symbol in set(re.findall(r"memref\.global [^@]*@(\w+)", body)):
        body = re.sub(rf"@{symbol}\b", f"@{name}_{symbol}", body)
    body = re.sub(
        r"(arith\.addf %\S+, %\S+)(?: fastmath<\w+>)? : (f32|f64)", r"\1 fastmath<reassoc,contract> : \2", body
    )
    return body.replace(f"func.func @{name}(", f"func.func private @{name}(")


def _reason(error: Exception) -> str:
    found = re.findall(r'error: "?[^\n]*?"?([^\n]*)', str(error))
    first = next((line.strip() for line in str(error).splitlines() if "error" in line.lower() and ":" in line), "")
    return (found[0].strip() if found else first)[:300] or type(error).__name__


def _operators(graph: fx.Graph) -> str:
    names = sorted({str(node.target) for node in graph.nodes if node.op == "call_function"})
    return f"the part of the graph holds {', '.join(names)}"
