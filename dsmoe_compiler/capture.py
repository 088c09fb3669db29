"""From a model to the graphs of its phases, with every mixture-of-experts layer raised to dsmoe:: operators."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import dsmoe_runtime.ops  # noqa: F401  registers the operators
from dsmoe_compiler.blocks import Block, Raised, find_blocks, kind, raise_block, swapped, why_not
from dsmoe_compiler.explanation import Explanation, LayerReport, PassReport
from dsmoe_compiler.phases import PHASES, Phase, example_inputs
from dsmoe_compiler.targets.lower import operator_name, values
from dsmoe_model.moe import MoE
from dsmoe_model.transformer import Transformer
from dsmoe_passes import pipeline
from dsmoe_passes.result import layer_of
from dsmoe_runtime.ops import cuda

log = logging.getLogger(__name__)
Progress = Callable[[str], None]
MODEL = "model."  # where the phases hold the model
MOE_OP, EXPERTS_OP = torch.ops.dsmoe.moe.default, torch.ops.dsmoe.experts.default


class Capture:
    """The phases of a language model, traced and fused one by one; `blocks` tells how the experts' loops are captured.

    `phases()` raises the blocks and yields each phase when it is ready, so that a target may prepare itself during the
    former and compile one phase while the next is traced; after it, `explanation()` tells all. `dump` names a pass (or
    "all") whose graphs are kept as text; `debug` compares numbers after every pass over a block.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        batch: int,
        capacity: int,
        dump: str | None = None,
        debug: bool = False,
        progress: Progress = log.info,
    ) -> None:
        self.model, self.batch, self.capacity = model, batch, capacity
        self.dump, self.debug, self.progress = dump, debug, progress
        self.graphs: dict[str, fx.GraphModule] = {}
        self.raised: list[tuple[Block, Raised]] = []
        self.passes: list[PassReport] = []
        self.seconds = 0.0

    def raise_layers(self) -> list[tuple[Block, Raised]]:
        """Every mixture-of-experts block with what became of it; the work is done once."""
        if self.raised:
            return self.raised
        start = time.perf_counter()
        weight = self.model.embed_tokens.weight
        x = torch.zeros(self.batch, 4, self.model.config.hidden_size, dtype=weight.dtype, device=weight.device)
        if self.debug:
            x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        ids = torch.zeros(self.batch, 4, dtype=torch.int64, device=weight.device)
        layers = [(name, m) for name, m in self.model.named_modules() if isinstance(m, MoE) and m.experts is not None]
        blocks = [Block(name, module, (x, ids, None)) for name, module in layers]
        self.raised, self.passes = raise_blocks(
            blocks, self.model, dump=self.dump, debug=self.debug, progress=self.progress
        )
        self.seconds += time.perf_counter() - start
        return self.raised

    def phases(self, names: tuple[str, ...] = ("prefill", "decode")) -> Iterator[Phase]:
        """Each of the phases in `names`, fused and packed."""
        self.raise_layers()
        for name in names:
            start = time.perf_counter()
            self.progress(f"capture: {name}")
            inputs, free = example_inputs(self.model, name, batch=self.batch, capacity=self.capacity)
            with swapped(self.raised):
                graph = trace(PHASES[name](self.model).eval(), inputs, free)
            self.passes += report_steps(name, pipeline.run(graph, dump=self.dump))
            self.graphs[name] = graph
            self.seconds += time.perf_counter() - start
            yield Phase(name, graph, inputs)

    def explanation(self) -> Explanation:
        """What happened to every layer, as the last phase's graph shows."""
        graph = list(self.graphs.values())[-1]
        return Explanation(report_layers(self.raised, graph, prefix=MODEL), tuple(self.passes), self.seconds)

    def operators(self) -> dict[str, fx.Node]:
        """Block name -> the `dsmoe::` operator that computes it in the last phase's graph."""
        return operators_of(list(self.graphs.values())[-1], [block.name for block, _ in self.raised], prefix=MODEL)


def explain_module(
    model: nn.Module, inputs: tuple[Any, ...], *, dump: str | None = None, progress: Progress = lambda _: None
) -> Explanation:
    """Explain any module on the inputs of one call: its blocks are traced and raised, then it is traced whole."""
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


def trace(module: nn.Module, inputs: tuple[Any, ...], free: Any, *, functional: bool = False) -> fx.GraphModule:
    """One graph that holds its parameters (`get_attr`); dimensions named in `free` are symbolic.

    `functional`: nothing in it is written in place, but for the inputs at its end; that traces twice.
    """
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=free, strict=False)
        program = program.run_decompositions({}) if functional else program
    return program.module(check_guards=False)  # type: ignore[return-value]


def operators_of(graph: fx.GraphModule, blocks: list[str], *, prefix: str) -> dict[str, fx.Node]:
    """The `dsmoe::` operator that stands for each block."""
    found: dict[str, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.target in (MOE_OP, EXPERTS_OP):
            path = layer_of(node).removeprefix(prefix)
            found |= {name: node for name in blocks if path == name or path.startswith(name + ".")}
    return found


def report_layers(raised: list[tuple[Block, Raised]], graph: fx.GraphModule, *, prefix: str) -> tuple[LayerReport, ...]:
    """One line for every block, read off the final graph."""
    found = operators_of(graph, [block.name for block, _ in raised], prefix=prefix)
    return tuple(report_layer(block, outcome, found.get(block.name)) for block, outcome in raised)


def report_layer(block: Block, outcome: Raised, node: fx.Node | None) -> LayerReport:
    """What became of one block: its operator, and why it is no more than that."""
    if outcome.reason or node is None:
        reason = outcome.reason or "its operator is not in the whole model's graph"
        return LayerReport(block.name, False, "", None, "eager loop", reason, outcome.node)
    patterns = [r.pattern for step in outcome.steps for r in step.result.rewritten]
    if node.target is EXPERTS_OP:
        refused = next((r for step in outcome.steps for r in step.result.refused), None)
        reason, where = (refused.because, refused.node) if refused else ("the gate's values are used elsewhere", None)
        return LayerReport(block.name, True, " + ".join(patterns), "dsmoe::experts", kernel_of(node), reason, where)
    if node.args[-2] is not None:
        patterns.append("shared experts")
    return LayerReport(block.name, True, " + ".join(patterns), "dsmoe::moe", kernel_of(node))


def kernel_of(node: fx.Node) -> str:
    """What runs the operator on the device that the graph is for, and on a GPU why it is not the kernels."""
    value = node.meta["val"]
    device = (value[0] if isinstance(value, tuple | list) else value).device
    if device.type != "cuda":
        return "torch rule" if device.type == "meta" else f"torch rule on {device.type}"
    reason = cuda.why_not(operator_name(node) or "", values(node))
    if reason:
        return f"torch rule on cuda: {reason}"
    where = cuda.architecture(device)
    return f"Triton kernels ({where})" if where else "Triton kernels"


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
