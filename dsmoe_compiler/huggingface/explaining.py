"""What bare `torch.compile(model, backend="dsmoe")` does to a model: its capture and passes, without Inductor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import fx, nn

from dsmoe_compiler import backend
from dsmoe_compiler.explanation import Explanation, LayerReport
from dsmoe_compiler.huggingface.eager_loop import traces_eager_experts
from dsmoe_compiler.huggingface.folder import stacked_experts

MANY = 256  # frames of a model that breaks often
UNSEEN = "none of the captured graphs holds anything like its experts"
NO_GRAPH = "its code is in no graph: Dynamo breaks the graph there"


def explain_graphs(
    model: nn.Module, inputs: Sequence[Any] | Mapping[str, Any], *, dump: str | None = None, run: bool = False
) -> Explanation:
    """Every mixture-of-experts layer of `model` on one call: fused, or the node and the reason.

    `inputs` are the call's arguments, positional or named. Grad mode and training mode are the caller's. `dump` names
    a pass (or "all") whose graphs are kept as text. Nothing is compiled: captured graphs run as they are, or with
    `run` as the passes left them.
    """
    return explained_call(model, inputs, dump=dump, run=run)[0]


def explained_call(
    model: nn.Module, inputs: Sequence[Any] | Mapping[str, Any], *, dump: str | None = None, run: bool = False
) -> tuple[Explanation, Any]:
    """The explanation, and what the call returned."""
    found: list[Explanation] = []
    breaks: list[str] = []

    @traces_eager_experts
    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph, explanation = backend.fuse(gm, example_inputs, dump=dump, name=f"graph {len(found)}")
        found.append(explanation)
        return graph.forward if run else gm.forward

    spare = copy.deepcopy(inputs)  # a call may write into what it is given
    before = dict(torch._dynamo.utils.counters["graph_break"])
    with torch._dynamo.config.patch(recompile_limit=MANY):
        result = _call(torch.compile(model, backend=record), inputs)
    for reason, count in torch._dynamo.utils.counters["graph_break"].items():
        if count > before.get(reason, 0):
            breaks.append(f"graph break: {reason.strip().splitlines()[0]}")
    notes = tuple(note for explanation in found for note in explanation.notes)
    layers, unseen = merged(model, found)
    if unseen:
        called = reached(model, unseen, spare)
        reason = notes[0] if notes else NO_GRAPH if breaks else UNSEEN
        layers += [LayerReport(n, False, "", None, "as captured", reason) for n in unseen if n in called]
        breaks += [f"{name} is not called on these inputs" for name in unseen if name not in called]
    passes = tuple(step for explanation in found for step in explanation.passes)
    seconds = sum(explanation.capture_seconds for explanation in found)
    return Explanation(tuple(layers), passes, seconds, (*notes, *dict.fromkeys(breaks))), result


def merged(model: nn.Module, found: Sequence[Explanation]) -> tuple[list[LayerReport], list[str]]:
    """The layers of several graphs in the model's order, and the stacked experts that none of them holds.

    A graph of a frame of its own, behind a graph break, names its layers from there: `mlp`, one for each such frame.
    """
    whole = {name for name, _ in model.named_modules()}
    layers: dict[tuple[str, int], LayerReport] = {}
    for number, explanation in enumerate(found):
        for layer in explanation.layers:
            key = (layer.name, 0 if layer.name in whole else number)
            if key not in layers or layers[key].fused:
                layers[key] = layer
    holders = [name for name, _ in stacked_experts(model)]
    short = sum(name not in whole for name, _ in layers)
    covered = [name for name in holders if any(_covers(seen, name) for seen, _ in layers if seen in whole)]
    behind = [name for name in holders if name not in covered and any(_covers(seen, name) for seen, _ in layers)]
    unseen = [name for name in holders if name not in covered and name not in behind[:short]]

    def place(layer: LayerReport) -> int:
        return min((i for i, name in enumerate(holders) if _covers(layer.name, name)), default=0)

    return sorted(layers.values(), key=place), unseen


def reached(model: nn.Module, names: Sequence[str], inputs: Sequence[Any] | Mapping[str, Any]) -> set[str]:
    """Those of the modules `names` that an eager call of `model` runs."""
    called: set[str] = set()
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name in names
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            _call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return called


def _call(function: Callable[..., Any], inputs: Sequence[Any] | Mapping[str, Any]) -> Any:
    return function(**inputs) if isinstance(inputs, Mapping) else function(*inputs)


def _covers(layer: str, holder: str) -> bool:
    """Whether the layer `layer` is the module `holder` or holds it, in the whole model or in a frame of its own."""
    return not layer or f".{layer}." in f".{holder}."
