"""From a model to the graphs of its phases, with every mixture-of-experts layer raised to dsmoe:: operators."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import dsmoe_runtime.ops  # noqa: F401  registers the operators
from dsmoe_compiler.blocks import Block, Raised, find_blocks, kind, raise_block, swapped, why_not
from dsmoe_compiler.explain import Explanation, LayerReport, PassReport
from dsmoe_compiler.phases import PHASES, Phase, example_inputs
from dsmoe_model.transformer import Transformer
from dsmoe_passes import pipeline
from dsmoe_passes.result import layer_of

log = logging.getLogger(__name__)
Progress = Callable[[str], None]
MOE, EXPERTS = torch.ops.dsmoe.moe.default, torch.ops.dsmoe.experts.default


@dataclass(frozen=True)
class Captured:
    """The phases' graphs, fused, and what happened on the way."""

    phases: dict[str, Phase]
    explanation: Explanation


def capture(
    model: Transformer,
    *,
    batch: int,
    capacity: int,
    phases: tuple[str, ...] = ("prefill", "decode"),
    dump: str | None = None,
    debug: bool = False,
    progress: Progress = lambda _: None,
) -> Captured:
    """Trace and fuse the phases of a language model; see `blocks` for how the experts' loops are captured.

    `dump` names a pass (or "all") whose graphs are kept as text; `debug` compares numbers after every pass of a block.
    """
    start = time.perf_counter()
    width = model.config.hidden_size
    parameter = next(model.parameters())
    x = torch.zeros(batch, 4, width, dtype=parameter.dtype, device=parameter.device)
    if debug:
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    ids = torch.zeros(batch, 4, dtype=torch.int64, device=parameter.device)
    blocks = [Block(name, module, (x, ids, None)) for name, module in find_blocks(model)]
    raised, passes = raise_blocks(blocks, model, dump=dump, debug=debug, progress=progress)
    graphs: dict[str, Phase] = {}
    with swapped(raised):
        for name in phases:
            progress(f"capture: {name}")
            inputs, free = example_inputs(model, name, batch=batch, capacity=capacity)
            graph = trace(PHASES[name](model).eval(), inputs, free)
            steps = pipeline.run(graph, dump=dump)
            passes += report_steps(name, steps)
            graphs[name] = Phase(name, graph, inputs)
    layers = report_layers(raised, graphs[phases[-1]].graph, prefix="model.")
    seconds = time.perf_counter() - start
    return Captured(graphs, Explanation(layers, tuple(passes), seconds))


def explain_module(
    model: nn.Module, inputs: tuple[Any, ...], *, dump: str | None = None, progress: Progress = lambda _: None
) -> Explanation:
    """Explain any module, on the inputs of one call: its blocks are found, traced and raised, and it is traced whole."""
    start = time.perf_counter()
    blocks = []
    with recorded(find_blocks(model)) as calls, torch.no_grad():
        model(*inputs)
    for name, module in find_blocks(model):
        if name in calls:
            blocks.append(Block(name, module, calls[name]))
    raised, passes = raise_blocks(blocks, model, dump=dump, debug=False, progress=progress)
    with swapped(raised):
        graph = trace(model, inputs, None)
    steps = pipeline.run(graph, dump=dump)
    layers = report_layers(raised, graph, prefix="")
    return Explanation(layers, (*passes, *report_steps("model", steps)), time.perf_counter() - start)


def raise_blocks(
    blocks: list[Block], model: nn.Module, *, dump: str | None, debug: bool, progress: Progress
) -> tuple[list[tuple[Block, Raised]], list[PassReport]]:
    """Raise every block, tracing each kind once."""
    kinds: dict[tuple, Raised] = {}
    raised, passes = [], []
    for block in blocks:
        reason = why_not(block, model)
        if reason:
            raised.append((block, Raised(reason=reason)))
            continue
        key = kind(block)
        if key not in kinds:
            progress(f"capture: {block.name} ({type(block.module).__name__})")
            kinds[key] = raise_block(block, dump=dump, debug=debug)
            passes += report_steps(block.name, kinds[key].steps)
        raised.append((block, kinds[key]))
    for block, outcome in raised:
        if outcome.reason:
            log.warning("%s is left alone: %s", block.name, outcome.reason)
    return raised, passes


def trace(module: nn.Module, inputs: tuple[Any, ...], free: Any) -> fx.GraphModule:
    """One graph that holds its parameters (`get_attr`); dimensions named in `free` are symbolic."""
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=free, strict=False)
    return program.module(check_guards=False)  # type: ignore[return-value]


def report_layers(raised: list[tuple[Block, Raised]], graph: fx.GraphModule, *, prefix: str) -> tuple[LayerReport, ...]:
    """One line for every block, read off the final graph."""
    found = {}
    for node in graph.graph.nodes:
        if node.target in (MOE, EXPERTS):
            found[layer_of(node).removeprefix(prefix)] = node
    rows = []
    for block, outcome in raised:
        node = next((n for path, n in found.items() if path == block.name or path.startswith(block.name + ".")), None)
        if outcome.reason or node is None:
            reason = outcome.reason or "its operator is not in the whole model's graph"
            rows.append(LayerReport(block.name, False, "", None, "eager loop", reason, outcome.node))
            continue
        patterns = [r.pattern for step in outcome.steps for r in step.result.rewritten]
        if node.target is MOE and node.args[-2] is not None:
            patterns.append("shared experts")
        operator = "dsmoe::moe" if node.target is MOE else "dsmoe::experts"
        refused = [r for step in outcome.steps for r in step.result.refused]
        note = refused[0] if refused and node.target is not MOE else None
        rows.append(
            LayerReport(
                block.name,
                True,
                " + ".join(patterns),
                operator,
                kernel_of(node),
                note.because if note else None,
                note.node if note else None,
            )
        )
    return tuple(rows)


def kernel_of(node: fx.Node) -> str:
    """What runs the operator on the device that the graph is for."""
    device = node.meta["val"][0].device if isinstance(node.meta["val"], (tuple, list)) else node.meta["val"].device
    return f"torch rule on {device.type}"


def report_steps(graph: str, steps: list[pipeline.Step] | tuple[pipeline.Step, ...]) -> list[PassReport]:
    """The passes' outcome, for people."""
    return [
        PassReport(
            graph,
            step.result.name,
            step.seconds,
            len(step.result.rewritten),
            len(step.result.refused),
            step.result.removed,
            step.graph_before,
            step.graph_after,
        )
        for step in steps
    ]


@contextmanager
def recorded(blocks: list[tuple[str, nn.Module]]) -> Iterator[dict[str, tuple[Any, ...]]]:
    """While open, the arguments of each block's first call are kept."""
    calls: dict[str, tuple[Any, ...]] = {}
    handles = []
    for name, module in blocks:

        def keep(_module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            calls.setdefault(name, pytree.tree_map(lambda a: a.detach() if isinstance(a, torch.Tensor) else a, args))

        handles.append(module.register_forward_pre_hook(keep))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
