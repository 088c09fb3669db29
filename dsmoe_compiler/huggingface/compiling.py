"""A transformers model into an artifact: captured whole, fused, packaged, proved."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dsmoe_compiler import artifact as artifacts
from dsmoe_compiler.artifact import Artifact
from dsmoe_compiler.capture import EXPERTS_OP, MOE_OP, report_steps, trace
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.explanation import Explanation, LayerReport, PassReport
from dsmoe_compiler.huggingface.folder import Pretrained, experts_run_as, stacked_experts
from dsmoe_compiler.huggingface.phases import PHASES, Shapes, cache_shapes, example_inputs
from dsmoe_compiler.huggingface.proof import Sizes, prove
from dsmoe_compiler.layer_reports import block_of, layer_reports
from dsmoe_compiler.phases import Phase
from dsmoe_compiler.staging import Stage
from dsmoe_compiler.targets import aoti
from dsmoe_passes import pipeline
from dsmoe_passes.region import call, item
from dsmoe_passes.result import layer_of
from dsmoe_runtime.errors import ConfigError, NotFusedError, TargetError

log = logging.getLogger(__name__)
aten = torch.ops.aten


class PretrainedCapture:
    """The phases of a transformers model, traced whole and fused; `explanation()` tells all afterwards."""

    def __init__(
        self,
        pretrained: Pretrained,
        shapes: Shapes,
        *,
        dump: str | None = None,
        progress: Callable[[str], None] = log.info,
    ) -> None:
        self.pretrained, self.shapes, self.dump, self.progress = pretrained, shapes, dump, progress
        self.passes: list[PassReport] = []
        self.layers: tuple[LayerReport, ...] = ()
        self.sizes: Sizes = []
        self.seconds = 0.0

    def phases(self, names: tuple[str, ...] = ("prefill", "decode"), *, strict: bool = False) -> Iterator[Phase]:
        """Each of the phases in `names`. Raises: NotFusedError under `strict`."""
        for name in names:
            start = time.perf_counter()
            self.progress(f"capture: {name}")
            inputs, free = example_inputs(self.pretrained, name, self.shapes)
            with experts_run_as(self.pretrained.model, "grouped_mm"):  # eager's loop cannot be traced
                graph = trace(PHASES[name](self.pretrained.model).eval(), inputs, free, functional=True)
            steps = pipeline.run(graph, dump=self.dump)
            self.passes += report_steps(name, steps)
            self.layers = reports_of(self.pretrained.model, graph, steps)
            left = [layer for layer in self.layers if not layer.fused]
            for layer in left:
                log.warning("%s: %s is left alone: %s", name, layer.name, layer.reason)
            if left and strict:
                count = f"{len(left)} of {len(self.layers)} layers were left alone"
                raise NotFusedError(f"strict: {count}; {left[0].name}: {left[0].reason}")
            check_portable(graph, left)
            self.sizes = tell_experts(graph)
            self.seconds += time.perf_counter() - start
            yield Phase(name, graph, inputs)

    def explanation(self) -> Explanation:
        """What happened to every layer, as the last phase's graph shows."""
        return Explanation(self.layers, tuple(self.passes), self.seconds)


def reports_of(model: Any, graph: fx.GraphModule, steps: list[pipeline.Step]) -> tuple[LayerReport, ...]:
    """One report for every module with stacked experts, in the model's order."""
    found = {clean(r.name): replace(r, name=clean(r.name)) for r in layer_reports(graph, steps)}
    names = [name for name, _ in stacked_experts(model)]
    for name in names:
        block = block_of(name)
        if block not in found and name not in found:
            reason = "nothing like routed experts was found in its part of the graph"
            found[block] = LayerReport(block, False, "", None, "as captured", reason)
    order = {block_of(name): number for number, name in enumerate(names)}
    return tuple(sorted(found.values(), key=lambda layer: order.get(layer.name, len(order))))


def check_portable(graph: fx.GraphModule, left: list[LayerReport]) -> None:
    """Raises: TargetError for an operator that a package cannot carry: it is written in Python, and not ours."""
    for node in graph.graph.nodes:
        space = getattr(node.target, "namespace", None)
        if node.op == "call_function" and space not in (None, "aten", "dsmoe", "prims", "prim"):
            why = f"; {left[0].name} was left alone: {left[0].reason}" if left else ""
            raise TargetError(
                f"{clean(layer_of(node)) or 'the model'} calls {node.target}, which a package cannot carry{why}. "
                'torch.compile(model, backend="dsmoe") runs such a model'
            )


def clean(path: str) -> str:
    """The path in the model, of one in a phase, which holds the model as `model`."""
    return path.removeprefix("model.")


def tell_experts(graph: fx.GraphModule) -> Sizes:
    """Make the experts of all layers the graph's second output, `[L, T, K]`: experts and top-k of each layer.

    Raises: ConfigError, if layers choose different numbers of experts: they do not fit one tensor.
    """
    output = graph.graph.output_node()
    chosen, sizes = [], []
    for node in list(graph.graph.nodes):
        if node.target is MOE_OP:
            ids = next((user for user in node.users if user.target is operator.getitem and user.args[1] == 1), None)
            chosen.append(ids if ids is not None else item(graph.graph, node, 1, before=output))
            sizes.append((node.args[13].meta["val"].shape[0], int(node.args[4])))
        elif node.target is EXPERTS_OP:
            chosen.append(node.args[1])
            sizes.append((node.args[3].meta["val"].shape[0], node.args[1].meta["val"].shape[1]))
    if len({top_k for _, top_k in sizes}) > 1:
        raise ConfigError(f"layers choose {sorted({k for _, k in sizes})} experts a token: artifacts want one number")
    if chosen:
        stacked = call(graph.graph, aten.stack.default, (chosen,), before=output, like=chosen[-1])
        logits, _, *rest = output.args[0]  # type: ignore[misc, str-unpack]
        output.args = ((logits, stacked, *rest),)
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
    return sizes


def explain_pretrained(pretrained: Pretrained, *, stage: str | None = None) -> Explanation:
    """Every layer of the decode step with what is fused or why not; weights may be on the meta device."""
    capacity = CompileConfig(target="cpu").capacity(pretrained.positions)
    capture = PretrainedCapture(pretrained, cache_shapes(pretrained, batch=1, capacity=capacity), dump=stage)
    for _ in capture.phases(("decode",)):
        pass
    return capture.explanation()


def compile_pretrained(pretrained: Pretrained, config: CompileConfig, progress: Callable[[str], None]) -> Artifact:
    """As `api.compile`, which see."""
    import transformers

    assert config.target is not None
    capacity = config.capacity(pretrained.positions)
    pretrained = replace(pretrained, model=pretrained.model.to(config.target).eval())
    shapes = cache_shapes(pretrained, batch=config.batch_size, capacity=capacity)
    stage = Stage()
    try:
        capture = PretrainedCapture(pretrained, shapes, progress=progress)
        phases = capture.phases(strict=config.strict)
        reports = aoti.package(phases, stage.path, target=config.target, progress=progress)
        facts = artifacts.facts_of(config, capture.explanation())
        facts["transformers"] = {
            "version": transformers.__version__,
            "class": type(pretrained.model).__name__,
            "vocab_size": pretrained.vocab_size,
            "cache": [[list(key), list(value)] for key, value in shapes],
        }
        artifact = artifacts.assemble(
            stage, reports, config=pretrained.model.config.to_dict(), tokenizer=pretrained.tokenizer,
            target=config.target, dtype=str(pretrained.dtype).removeprefix("torch."), batch_size=config.batch_size,
            capacity=capacity, source=pretrained.source, facts=facts,
        )  # fmt: skip
        if config.verify:
            result = prove(pretrained, artifact.runner(), shapes, capture.sizes, config=config, progress=progress)
            artifact.manifest["verification"] = result.require().to_dict()
    except BaseException:
        stage.discard()
        raise
    return artifact
