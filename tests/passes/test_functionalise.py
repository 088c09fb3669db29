"""In-place operations become pure where nobody else sees the value, and stay where somebody may."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dsmoe_passes.functionalise import functionalise, writes


def mask_and_divide(x: Tensor) -> Tensor:
    scores = x.softmax(-1)
    mask = torch.zeros_like(scores)
    mask.scatter_(1, scores.topk(2)[1], 1.0)
    scores = scores * 1
    scores /= scores.sum(-1, keepdim=True)
    return scores * mask


def output_of_several(x: Tensor) -> Tensor:
    weights, experts = x.topk(2)
    weights /= weights.sum(-1, keepdim=True)
    return weights + experts


def view_of_fresh(x: Tensor) -> Tensor:
    out = torch.bmm(x[None], x.T[None]).squeeze(0)
    out.add_(1)
    return out


def written_through_a_view(x: Tensor) -> Tensor:
    y = x * 1
    y.view(-1).mul_(3)
    return y


def seen_through_a_view(x: Tensor) -> Tensor:
    y = x * 1
    flat = y.view(-1)
    y.mul_(3)
    return flat


def half_of_it(x: Tensor) -> Tensor:
    left, right = (x * 1).chunk(2, -1)
    left.mul_(2)
    return left + right


def the_input(x: Tensor) -> Tensor:
    x.mul_(2)
    return x + 1


PURE = [mask_and_divide, output_of_several, view_of_fresh]
SEEN = [written_through_a_view, seen_through_a_view, half_of_it, the_input]


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("function", PURE + SEEN)
def test_only_what_nobody_sees_is_rewritten(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    gm = torch.export.export(Call(function), (x,), strict=False).module(check_guards=False)
    assert any(writes(node) for node in gm.graph.nodes)
    expected = function(x.clone())
    functionalise(gm)
    gm.recompile()
    assert any(writes(node) for node in gm.graph.nodes) == (function in SEEN)
    assert torch.equal(gm(x.clone()), expected)
