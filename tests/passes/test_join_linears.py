"""Products that read one value become one; weights that are read elsewhere, and pairs, stay apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmoe_passes import pipeline
from dsmoe_passes.join_linears import join_linears
from dsmoe_passes.pack_weights import pack_weights
from dsmoe_runtime.agreement import assert_within_budget

H, WIDTHS = 24, (24, 8, 8)


class Layer(nn.Module):
    """Queries, keys and values of one input; `tied` reads the first weight once more."""

    def __init__(self, widths: tuple[int, ...], *, bias: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.parts, self.tied = nn.ModuleList(nn.Linear(H, width, bias=bias) for width in widths), tied

    def forward(self, x: Tensor) -> list[Tensor]:
        answers = [part(x) * (at + 1) for at, part in enumerate(self.parts)]
        return [*answers, F.linear(x.exp(), self.parts[0].weight)] if self.tied else answers


def captured(layer: Layer) -> torch.fx.GraphModule:
    free = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")},)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.zeros(2, 5, H),), dynamic_shapes=free)
    return program.module(check_guards=False)  # type: ignore[return-value]


def linears(graph: torch.fx.GraphModule) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))


def test_three_become_one_with_their_weights_packed() -> None:
    layer = Layer(WIDTHS).eval()
    graph = captured(layer)
    steps = pipeline.run(graph, passes=(join_linears, pack_weights))
    assert [len(step.result.rewritten) for step in steps] == [1, 1]
    assert linears(graph) == 1
    assert [tuple(p.shape) for p in graph.parameters()] == [(sum(WIDTHS), H)]
    x = torch.randn(3, 7, H, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eager, found = layer(x), graph(x)
        for one, wanted, exact in zip(found, eager, layer.double()(x.double()), strict=True):
            assert_within_budget(one.flatten(0, 1), eager=wanted.flatten(0, 1), exact=exact.flatten(0, 1))


@pytest.mark.parametrize(
    ("layer", "left"),
    [(Layer(WIDTHS[:2]), 2), (Layer(WIDTHS, bias=True), 3), (Layer(WIDTHS, tied=True), 4)],
    ids=["two", "biases", "a weight that is read elsewhere"],
)
def test_others_stay_apart(layer: Layer, left: int) -> None:
    graph = captured(layer.eval())
    pipeline.run(graph, passes=(join_linears, pack_weights))
    assert linears(graph) == left
