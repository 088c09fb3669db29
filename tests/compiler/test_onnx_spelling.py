"""Norms, rotations and shared heads in one operator: every spelling, the same numbers, and what must stay as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_compiler.capture import trace
from dsmoe_passes.canonicalise import canonicalise

pytest.importorskip("onnxscript")
from dsmoe_compiler.targets.onnx.spelling import respell

B, HEADS, S, D = 2, 4, 6, 8
ROTARY, NORM = "onnx.RotaryEmbedding.opset23", "aten.rms_norm.default"


class Calls(nn.Module):
    """A function of tensors, and a weight, as a module that can be traced."""

    def __init__(self, function: Callable[..., Tensor], weight: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(weight)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.weight, *inputs)


def respelled(function: Callable[..., Tensor], *inputs: Tensor, weight: Tensor | None = None) -> Counter[str]:
    """How often each operator is called after the rewrite, which gives the same numbers."""
    module = Calls(function, torch.rand(D) + 0.5 if weight is None else weight)
    free: Any = [{0: torch.export.Dim.DYNAMIC} for _ in inputs]
    graph = trace(module, inputs, {"inputs": tuple(free)} if len(inputs) else None, functional=True)
    canonicalise(graph)
    respell(graph)
    with torch.no_grad():
        torch.testing.assert_close(graph(*inputs), module(*inputs))
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda w, x: w * normed(x),
        lambda w, x: normed(x) * w,
        lambda w, x: w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
        lambda w, x: w * (torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * x),
        lambda w, x: (1.0 + w) * normed(x),
    ],
)
def test_norms(spelling: Callable[..., Tensor]) -> None:
    assert respelled(spelling, torch.randn(B, S, D))[NORM] == 1


def test_norms_in_half_precision_keep_their_casts() -> None:
    x, weight = torch.randn(B, S, D).half(), (torch.rand(D) + 0.5).half()
    scaled_narrow = respelled(lambda w, x: w * normed(x.float()).half(), x, weight=weight)
    assert scaled_narrow[NORM] == 1
    assert scaled_narrow["aten._to_copy.default"] == 0
    scaled_wide = respelled(lambda w, x: (w * normed(x.float())).half(), x, weight=weight)
    assert scaled_wide[NORM] == 1
    assert scaled_wide["aten._to_copy.default"] == 3


@pytest.mark.parametrize(
    "near_miss",
    [
        lambda w, x: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)),
        lambda w, x: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)),
        lambda w, x: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-6)),
        lambda w, x: w * (x.flip(0) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda w, x: (lambda y: w * y + y)(normed(x)),  # somebody else reads what it gives before it is scaled
    ],
)
def test_what_is_no_norm(near_miss: Callable[..., Tensor]) -> None:
    assert respelled(near_miss, torch.randn(B, S, D))[NORM] == 0


def table(x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, S, D]` with equal halves."""
    angle = torch.arange(S)[:, None] * (0.3 ** torch.arange(D // 2))[None]
    angle = angle[None].expand(x.shape[0], -1, -1)
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def half_turn(x: Tensor) -> Tensor:
    return torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)


def chunked(w: Tensor, x: Tensor) -> Tensor:
    cos, sin = (t[:, None] for t in table(x))
    first, second = x.chunk(2, -1)
    return w * (x * cos + torch.cat((-second, first), -1) * sin)


def sliced(w: Tensor, x: Tensor) -> Tensor:
    cos, sin = (t[:, None] for t in table(x))
    return w * (half_turn(x) * sin + x * cos)


def flat_table(w: Tensor, x: Tensor) -> Tensor:
    angle = torch.arange(S)[:, None] * (0.3 ** torch.arange(D // 2))[None]
    angle = torch.cat((angle, angle), -1)
    return w * (x * angle.cos() + half_turn(x) * angle.sin())


def in_halves(w: Tensor, x: Tensor) -> Tensor:
    cos, sin = (t[:, None, :, : D // 2] for t in table(x))
    first, second = x.chunk(2, -1)
    return w * torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def even_and_odd(w: Tensor, x: Tensor) -> Tensor:
    cos, sin = (t[:, None, :, : D // 2] for t in table(x))
    even, odd = x[..., 0::2], x[..., 1::2]
    return w * torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


def as_complex(w: Tensor, x: Tensor) -> Tensor:
    angle = torch.arange(S)[:, None] * (0.3 ** torch.arange(D // 2))[None]
    angle = angle[None].expand(x.shape[0], -1, -1)
    turn = (torch.polar(torch.ones_like(angle), angle) * 1.25).unsqueeze(1)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return w * torch.view_as_real(pairs * turn).flatten(3)


@pytest.mark.parametrize("spelling", [chunked, sliced, flat_table, in_halves, even_and_odd, as_complex])
def test_rotations(spelling: Callable[..., Tensor]) -> None:
    found = respelled(spelling, torch.randn(B, HEADS, S, D))
    assert found[ROTARY] == 1
    assert not any("complex" in name or "polar" in name for name in found)


def other_sign(w: Tensor, x: Tensor) -> Tensor:
    cos, sin = (t[:, None] for t in table(x))
    return w * (x * cos - half_turn(x) * sin)


def swapped_halves(w: Tensor, x: Tensor) -> Tensor:
    cos, sin = (t[:, None] for t in table(x))
    return w * (x * cos + torch.cat((-x[..., : D // 2], x[..., D // 2 :]), -1) * sin)


def uneven_table(w: Tensor, x: Tensor) -> Tensor:
    cos, sin = (t[:, None] * torch.arange(1.0, D + 1) for t in table(x))
    return w * (x * cos + half_turn(x) * sin)


def other_tensor(w: Tensor, x: Tensor) -> Tensor:
    cos, sin = (t[:, None] for t in table(x))
    return w * (x * cos + half_turn(x.flip(0)) * sin)


def crossed(w: Tensor, x: Tensor) -> Tensor:
    cos, sin = (t[:, None, :, : D // 2] for t in table(x))
    first, second = x.chunk(2, -1)
    return w * torch.cat((first * cos - second * sin, second * sin + first * cos), -1)


@pytest.mark.parametrize("near_miss", [other_sign, swapped_halves, uneven_table, other_tensor, crossed])
def test_what_is_no_rotation(near_miss: Callable[..., Tensor]) -> None:
    assert respelled(near_miss, torch.randn(B, HEADS, S, D))[ROTARY] == 0


def repeat_interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1)


def expanded(x: Tensor) -> Tensor:
    return x[:, :, None].expand(x.shape[0], 2, 2, S, D).reshape(x.shape[0], 4, S, D)


def tiled(x: Tensor) -> Tensor:
    return x[:, None].expand(x.shape[0], 2, 2, S, D).reshape(x.shape[0], 4, S, D)


@pytest.mark.parametrize(("repeat", "shared"), [(repeat_interleaved, True), (expanded, True), (tiled, False)])
def test_heads_that_share_keys_and_values(repeat: Callable[[Tensor], Tensor], shared: bool) -> None:
    def attention(w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return w * F.scaled_dot_product_attention(q, repeat(k), repeat(v))

    q, k, v = (torch.randn(B, heads, S, D) for heads in (4, 2, 2))
    found = respelled(attention, q, k, v)
    assert (found["aten.expand.default"] + found["aten.repeat_interleave.self_int"] == 0) == shared
