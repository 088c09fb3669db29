"""`torch.compile(model, backend="dsmoe")`: raise and fuse what Dynamo captured, then hand it to Inductor.

    fast = torch.compile(model, backend="dsmoe")                                  # mode="reduce-overhead" works too
    fast = torch.compile(model, backend="dsmoe", options={"dsmoe.strict": True})  # a layer left alone is an error
    fast(x)
    fast = torch.compile(model, backend="dsmoe", options={"target": "mlir-cpu"})  # inference on the CPU, no Inductor
    print(dsmoe_compiler.backend.last_report())                                   # every layer: fused, or why not

The rewrite happens above autograd, so training works: the operators bring their own backward. Options of Inductor
pass through. The loop over experts of an eager model asks for the tokens of each expert, whose number depends on
data. Dynamo breaks the graph there unless `capture_dynamic_output_shape_ops` is on; importing this module, which
torch does when the back end is asked for by name, turns it on. transformers' eager loop cannot be traced even so:
for this back end `huggingface.eager_loop` spells it as grouped GEMMs. A deep model compiles faster through
`dsmoe_compiler.compile`, which traces each kind of layer once.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch._dynamo
import torch._dynamo.config
from torch import fx
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx

import dsmoe_runtime.ops  # noqa: F401  registers the operators
from dsmoe_compiler import checkpointed
from dsmoe_compiler.capture import report_steps
from dsmoe_compiler.explanation import Explanation, LayerReport, PassReport
from dsmoe_compiler.huggingface import eager_loop
from dsmoe_compiler.layer_reports import layer_reports
from dsmoe_compiler.targets.lower import operator_name, values
from dsmoe_passes import pipeline
from dsmoe_runtime.errors import ConfigError, NotFusedError, TargetError
from dsmoe_runtime.ops import cuda

log = logging.getLogger(__name__)
Compiled = Callable[..., Any]
aten = torch.ops.aten
KEPT = 64  # reports
_reports: deque[Explanation] = deque(maxlen=KEPT)

torch._dynamo.config.capture_dynamic_output_shape_ops = True
eager_loop.install()
torch._dynamo.on_compile_start(eager_loop.install)  # where transformers is imported later


@dataclass(frozen=True)
class Options:
    """What `options={"dsmoe.NAME": value}` may say. `dump` names a pass (or "all") whose graphs are logged.

    `target`, which may go without `dsmoe.`: None for Inductor, or "mlir-cpu".
    """

    strict: bool = False
    dump: str | None = None
    target: str | None = None


@eager_loop.traces_eager_experts
def dsmoe(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Compiled:
    """The back end. `DSMOE_DISABLE=1` leaves everything to Inductor.

    Raises: ConfigError for an unknown `dsmoe.` option, NotFusedError under `dsmoe.strict`.
    """
    eager_loop.install()
    own, patches = read_options(options or {})
    if own.target is not None:
        check_target(own.target, mode, patches)
    if mode:
        patches = {**list_mode_options(mode), **patches}
    if os.environ.get("DSMOE_DISABLE") == "1":
        return cast(Compiled, compile_fx(gm, list(example_inputs), config_patches=patches))
    graph, explanation = fuse(gm, example_inputs, dump=own.dump)
    if own.target is not None:
        layers = tuple(replace(layer, kernel=own.target) if layer.fused else layer for layer in explanation.layers)
        explanation = replace(explanation, layers=layers)
    report(explanation, strict=own.strict)
    if own.target is not None:
        from dsmoe_compiler.targets.mlir.jit import compile_inference

        if explanation.notes:
            raise TargetError(f"target {own.target}: {explanation.notes[0]}")
        return compile_inference(graph, example_inputs)
    return cast(Compiled, compile_fx(graph, list(example_inputs), config_patches=capturable(graph, patches)))


def fuse(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, dump: str | None = None, name: str = "graph"
) -> tuple[fx.GraphModule, Explanation]:
    """Dynamo's graph after all passes, and what they did; what the back end does before it hands over to Inductor."""
    start = time.perf_counter()
    layers: list[LayerReport] = []
    passes: list[PassReport] = []
    notes: list[str] = []

    def rewrite(captured: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
        depth = torch._C._functorch.get_dynamic_layer_stack_depth()
        try:
            graph = functional(captured, inputs)
        except Exception as error:  # whatever torch cannot trace above autograd (vmap, say), Inductor may still compile
            while torch._C._functorch.get_dynamic_layer_stack_depth() > depth:  # the trace left what it had entered
                torch._C._functorch.pop_dynamic_layer_stack()
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            notes.append(f"{name} is left to Inductor as a whole: torch cannot write it above autograd: {first_line}")
            return captured
        steps = pipeline.run(graph, dump=dump)
        layers.extend(layer_reports(graph, steps))
        passes.extend(report_steps(name, steps))
        return graph

    graph = checkpointed.replace_regions(gm, rewrite) if checkpointed.regions(gm) else rewrite(gm, example_inputs)
    return graph, Explanation(tuple(layers), tuple(passes), time.perf_counter() - start, tuple(notes))


def last_report() -> Explanation | None:
    """What was fused in the last graph that this back end compiled; None before the first."""
    return _reports[-1] if _reports else None


def reports() -> tuple[Explanation, ...]:
    """What was fused in the last graphs, oldest first: a model has one for each graph break and recompilation."""
    return tuple(_reports)


def capturable(graph: fx.GraphModule, patches: dict[str, Any]) -> dict[str, Any]:
    """`patches` without CUDA graphs where an operator runs as plain torch on the GPU, which waits for the device."""
    if not patches.get("triton.cudagraphs"):
        return patches
    for node in graph.graph.nodes:
        name = operator_name(node)
        if name is None or not any(isinstance(v, torch.Tensor) and v.is_cuda for v in values(node)):
            continue
        reason = cuda.why_not(name, values(node))
        if reason:
            log.warning("no CUDA graphs: dsmoe::%s runs as plain torch on the GPU: %s", name, reason)
            return patches | {"triton.cudagraphs": False}
    return patches


def read_options(options: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Our options, and the rest, which are Inductor's."""
    options = {"dsmoe.target" if key == "target" else key: value for key, value in options.items()}
    mine = {key.removeprefix("dsmoe."): value for key, value in options.items() if key.startswith("dsmoe.")}
    unknown = sorted(set(mine) - set(Options.__dataclass_fields__))
    if unknown:
        known = ", ".join(f"dsmoe.{name}" for name in Options.__dataclass_fields__)
        raise ConfigError(f"unknown option dsmoe.{unknown[0]}; there are {known}")
    return Options(**mine), {key: value for key, value in options.items() if not key.startswith("dsmoe.")}


def check_target(target: str, mode: str | None, patches: dict[str, Any]) -> None:
    """Raises: ConfigError for a target that there is not, or for options of Inductor beside one that is not its."""
    if target != "mlir-cpu":
        raise ConfigError(f"target is {target!r}; it must be 'mlir-cpu', or left out for Inductor")
    if mode or patches:
        given = f"mode {mode!r}" if mode else f"option {next(iter(patches))!r}"
        raise ConfigError(f"{given} is for Inductor, and target {target} does not use it: leave one of them out")


def functional(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Dynamo's graph as functional aten above autograd; inputs that it writes are copied to at the end."""
    inputs = tuple(example_inputs)
    exported, signature = aot_export_module(gm, inputs, trace_joint=False, pre_dispatch=True, decompositions={})
    graph = cast(fx.GraphModule, exported)
    placeholders = {node.name: node for node in graph.graph.find_nodes(op="placeholder")}
    written = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    output = graph.graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    with graph.graph.inserting_before(output):
        for value in values[: len(written)]:
            target = placeholders[written[value.name]]  # type: ignore[union-attr]
            copy = graph.graph.call_function(aten.copy_.default, (target, value))
            copy.meta["val"] = target.meta["val"]
    output.args = (tuple(values[len(written) :]),)
    graph.recompile()
    return graph


def report(explanation: Explanation, *, strict: bool) -> None:
    """Keep and say once a graph what was fused and what was left alone.

    Raises: NotFusedError under `strict`, if a layer or the whole graph was.
    """
    _reports.append(explanation)
    left = explanation.left_alone
    if explanation.layers:
        log.info("%s", explanation.summary)
    for layer in explanation.layers:
        log.log(logging.INFO if layer.fused else logging.WARNING, "%s", layer)
    for note in explanation.notes:
        log.warning("%s", note)
    for step in explanation.passes:
        if step.graph_before is not None:
            log.info("before %s\n%s", step.name, step.graph_before)
            log.info("after %s\n%s", step.name, step.graph_after)
    if left and strict:
        first = left[0]
        raise NotFusedError(
            f"{len(left)} layers left alone; {first.name or 'the first'} at {first.node}: {first.reason}"
        )
    if explanation.notes and strict:
        raise NotFusedError(explanation.notes[0])
