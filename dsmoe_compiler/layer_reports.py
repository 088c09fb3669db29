"""Every mixture-of-experts layer of a graph that the passes have seen: read off their results and the graph.

A layer is an operator `dsmoe::moe` or `dsmoe::experts` in the graph, or experts that were refused. Results of the
other passes belong to the layer whose module they were traced in.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import TypeVar

from torch import fx

from dsmoe_compiler.capture import EXPERTS_OP, MOE_OP, kernel_of
from dsmoe_compiler.explanation import LayerReport
from dsmoe_compiler.layer_flops import layer_flops
from dsmoe_passes.pipeline import Step
from dsmoe_passes.result import Refused, Rewritten, layer_of

CALLED = "dsmoe::experts, called by the model"
ADVICE = {
    "match_experts": "The layer runs as it was captured",
    "match_router": "The experts are fused, the gate runs as it was captured",
    "fuse_moe": "Gate and experts run as two operators",
    "match_shared": "The shared experts run beside the operator",
}
Result = TypeVar("Result", Rewritten, Refused)


def layer_reports(graph: fx.GraphModule, steps: Iterable[Step]) -> tuple[LayerReport, ...]:
    """One report a layer: those with an operator in the graph's order, then those whose experts were refused."""
    results = {step.result.name: step.result for step in steps}
    nodes = [node for node in graph.graph.nodes if node.target in (MOE_OP, EXPERTS_OP)]
    blocks = [block_of(layer_of(node)) for node in nodes]
    reports = []
    for i, node in enumerate(nodes):
        rewritten = {name: _of(i, blocks, result.rewritten) for name, result in results.items()}
        refused = {name: _of(i, blocks, result.refused) for name, result in results.items()}
        reports.append(_report(graph, node, blocks[i], rewritten, refused))
    experts = results.get("match_experts")
    for no in experts.refused if experts else ():
        block = block_of(no.layer)
        flops, _ = layer_flops(graph, block)
        reports.append(
            LayerReport(
                block,
                False,
                "",
                None,
                "as captured",
                no.because,
                no.node,
                advice=ADVICE["match_experts"],
                flops=flops,
                fused_flops=None if flops is None else 0,
            )
        )
    return tuple(reports)


def block_of(path: str) -> str:
    """The module that holds gate and experts: `layers.1.mlp` of `layers.1.mlp.experts`."""
    head, _, last = path.rpartition(".")
    return head if last == "experts" else path


def _report(
    graph: fx.GraphModule,
    node: fx.Node,
    block: str,
    rewritten: dict[str, list[Rewritten]],
    refused: dict[str, list[Refused]],
) -> LayerReport:
    """What became of the layer that `node` computes."""
    gate, shared = (_pattern(rewritten, name) for name in ("match_router", "match_shared"))
    experts = _pattern(rewritten, "match_experts") or CALLED
    stages = ("match_shared",) if node.target is MOE_OP else ("match_router", "fuse_moe")
    stage, stopped = next(((name, no) for name in stages for no in refused.get(name, [])), ("", None))
    flops, fused_flops = layer_flops(graph, block, node)
    return LayerReport(
        name=block,
        fused=True,
        pattern=" + ".join(part for part in (gate, experts, shared) if part),
        operator="dsmoe::moe" if node.target is MOE_OP else "dsmoe::experts",
        kernel=kernel_of(node),
        reason=stopped.because if stopped else None,
        node=stopped.node if stopped else None,
        gate=gate,
        experts=experts,
        weights="packed" if rewritten.get("pack_weights") else "shared with the model",
        advice=ADVICE.get(stage),
        flops=flops,
        fused_flops=fused_flops,
    )


def _pattern(rewritten: dict[str, list[Rewritten]], name: str) -> str | None:
    found = rewritten.get(name)
    return found[0].pattern if found else None


def _of(index: int, blocks: list[str], results: tuple[Result, ...]) -> list[Result]:
    """The results that belong to the layer `blocks[index]`: traced in it or in its parent, and in no other layer's."""
    return [result for result in results if _owner(result.layer, blocks) == index]


def _owner(path: str, blocks: list[str]) -> int | None:
    """The layer in whose module, or beside it in its parent, `path` lies; the nearest one."""
    parts = path.split(".")
    shared = [_shared(parts, block.split(".")) for block in blocks]
    best = max(range(len(blocks)), key=shared.__getitem__, default=None)
    if best is None or shared[best] < len(blocks[best].split(".")) - 1:
        return None
    return best


def _shared(one: list[str], other: list[str]) -> int:
    """How many leading modules two paths have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
