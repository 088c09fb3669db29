"""What canonicalising drops computes nothing; each near-miss computes something, and stays."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dsmoe_passes.canonicalise import canonicalise
from tests.passes.loops import called

aten = torch.ops.aten
E = 6


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def trace(function: Callable[[Tensor], Tensor], x: Tensor) -> torch.fx.GraphModule:
    program = torch.export.export(Function(function), (x,), strict=False)
    return program.run_decompositions({}).module(check_guards=False)


def chosen(x: Tensor) -> Tensor:
    return x.topk(2).indices.reshape(-1)


DROPPED = {
    "view": ("view", lambda x: x.sin().view(4, E).cos()),
    "squeeze of unsqueeze": ("squeeze", lambda x: x.sin().unsqueeze(1).squeeze(1).cos()),
    "unsqueeze of squeeze": ("unsqueeze", lambda x: x[:1].sin().squeeze(0).unsqueeze(0).cos()),
    "squeeze of what is no 1": ("squeeze", lambda x: x.sin().squeeze(1).cos()),
    "clamp": ("clamp", lambda x: chosen(x).clamp(0, E - 1) + 1),
    "clamp of sorted": ("clamp", lambda x: chosen(x).sort().values.clamp(max=E - 1) + 1),
    "mask": ("masked_fill", lambda x: x.sin()[:, :2].masked_fill(x.topk(2).indices >= E, 0.0).cos()),
    "copy": ("copy", lambda x: aten.copy(x.sin(), x.cos()).exp()),
    "copy that casts and spreads": ("copy", lambda x: aten.copy(x.sin(), x[:1].double()).view(-1).exp()),
}
KEPT = {
    "view": ("view", lambda x: x.sin().view(E, 4).cos()),
    "squeeze of unsqueeze": ("squeeze", lambda x: x[:1].sin().unsqueeze(2).squeeze(0).cos()),
    "unsqueeze of squeeze": ("unsqueeze", lambda x: x[:1].sin().squeeze(0).unsqueeze(1).cos()),
    "clamp below": ("clamp", lambda x: chosen(x).clamp(0, E - 2) + 1),
    "clamp above": ("clamp", lambda x: chosen(x).clamp(1, E - 1) + 1),
    "clamp of a sum": ("clamp", lambda x: (chosen(x) + 1).clamp(0, E - 1) + 1),
    "clamp of values": ("clamp", lambda x: x.topk(2).values.clamp(0, E - 1) + 1),
    "mask": ("masked_fill", lambda x: x.sin()[:, :2].masked_fill(x.topk(2).indices >= E - 1, 0.0).cos()),
    "mask that spreads": ("masked_fill", lambda x: x.sin()[:1].masked_fill(x.argsort() >= E, 0.0).cos()),
    "view of the input": ("view", lambda x: x.view(4, E)),
    "copy to other strides": ("copy", lambda x: aten.copy(x.sin().t(), x.cos().view(E, 4)).exp()),
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_computes_nothing_goes(name: str) -> None:
    operator, function = DROPPED[name]
    x = torch.randn(4, E, generator=torch.Generator().manual_seed(0))
    gm = trace(function, x)
    assert named(gm, operator)
    canonicalise(gm)
    gm.graph.lint()
    gm.recompile()
    assert not named(gm, operator)
    assert torch.equal(gm(x), function(x))
    assert gm(x).stride() == function(x).stride()


@pytest.mark.parametrize("name", KEPT)
def test_what_computes_something_stays(name: str) -> None:
    operator, function = KEPT[name]
    x = torch.randn(4, E, generator=torch.Generator().manual_seed(0))
    gm = trace(function, x)
    canonicalise(gm)
    gm.recompile()
    assert named(gm, operator)
    assert torch.equal(gm(x), function(x))


def named(gm: torch.fx.GraphModule, operator: str) -> list[torch.fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function" and str(n.target).split(".")[1:2] == [operator]]


def test_a_floor_division_of_integers_has_one_spelling() -> None:
    gm = trace(lambda x: chosen(x).div(2, rounding_mode="floor"), torch.randn(4, E))
    canonicalise(gm)
    assert called(gm, "aten.floor_divide.default")
    gm = trace(lambda x: x.div(2, rounding_mode="floor"), torch.randn(4, E))
    canonicalise(gm)
    assert called(gm, "aten.div.Tensor_mode")
