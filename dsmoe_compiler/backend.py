"""`torch.compile(model, backend="dsmoe")`: raise and fuse what Dynamo captured, then hand it to Inductor.

    fast = torch.compile(model, backend="dsmoe")                                  # mode="reduce-overhead" works too
    fast = torch.compile(model, backend="dsmoe", options={"dsmoe.strict": True})  # a layer left alone is an error

The rewrite happens above autograd, so training works: the operators bring their own backward. Options of Inductor
pass through. The loop over experts of an eager model asks for the tokens of each expert, whose number depends on
data. Dynamo breaks the graph there unless `capture_dynamic_output_shape_ops` is on; importing this module, which
torch does when the back end is asked for by name, turns it on. A deep model compiles faster through
`dsmoe_compiler.compile`, which traces each kind of layer once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch._dynamo.config
from torch import fx
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx

import dsmoe_runtime.ops  # noqa: F401  registers the operators
from dsmoe_compiler.targets.lower import operator_name, values
from dsmoe_passes import pipeline
from dsmoe_passes.result import Refused
from dsmoe_runtime.errors import ConfigError, NotFusedError
from dsmoe_runtime.ops import cuda

log = logging.getLogger(__name__)
Compiled = Callable[..., Any]
aten = torch.ops.aten
torch._dynamo.config.capture_dynamic_output_shape_ops = True


@dataclass(frozen=True)
class Options:
    """What `options={"dsmoe.NAME": value}` may say. `dump` names a pass (or "all") whose graphs are logged."""

    strict: bool = False
    dump: str | None = None


def dsmoe(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Compiled:
    """The back end. `DSMOE_DISABLE=1` leaves everything to Inductor.

    Raises: ConfigError for an unknown `dsmoe.` option, NotFusedError under `dsmoe.strict`.
    """
    own, patches = read_options(options or {})
    if mode:
        patches = {**list_mode_options(mode), **patches}
    if os.environ.get("DSMOE_DISABLE") == "1":
        return cast(Compiled, compile_fx(gm, list(example_inputs), config_patches=patches))
    graph = functional(gm, example_inputs)
    steps = pipeline.run(graph, dump=own.dump)
    report(steps, own)
    return cast(Compiled, compile_fx(graph, list(example_inputs), config_patches=capturable(graph, patches)))


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
    mine = {key.removeprefix("dsmoe."): value for key, value in options.items() if key.startswith("dsmoe.")}
    unknown = sorted(set(mine) - set(Options.__dataclass_fields__))
    if unknown:
        known = ", ".join(f"dsmoe.{name}" for name in Options.__dataclass_fields__)
        raise ConfigError(f"unknown option dsmoe.{unknown[0]}; there are {known}")
    return Options(**mine), {key: value for key, value in options.items() if not key.startswith("dsmoe.")}


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


def report(steps: list[pipeline.Step], own: Options) -> None:
    """Say once a graph what was fused and what was left alone."""
    fused = [r for step in steps if step.result.name == "match_experts" for r in step.result.rewritten]
    left: list[Refused] = [r for step in steps if step.result.name == "match_experts" for r in step.result.refused]
    if fused or left:
        log.info("%d mixture-of-experts layers fused, %d left alone", len(fused), len(left))
    for refusal in left:
        log.warning("%s is left alone at %s: %s", refusal.layer or "a layer", refusal.node, refusal.because)
    for step in steps:
        if step.graph_before is not None:
            log.info("before %s\n%s", step.result.name, step.graph_before)
            log.info("after %s\n%s", step.result.name, step.graph_after)
    if left and own.strict:
        first = left[0]
        raise NotFusedError(
            f"{len(left)} layers left alone; {first.layer or 'the first'} at {first.node}: {first.because}"
        )
