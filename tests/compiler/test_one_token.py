"""What a decode step of one sequence is told on a GPU; the graph's part of it runs anywhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmoe_compiler.targets.aoti import accepted
from dsmoe_compiler.targets.one_token import OPTIONS, attend, masks_to_float, options_for, products


class Twice(nn.Module):
    """Two layers of attention under one mask."""

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        mask = torch.arange(x.shape[-2]) <= position[:, None]
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask) + F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_becomes_float_once(dtype: torch.dtype) -> None:
    inputs = (torch.randn(1, 2, 5, 8, dtype=dtype), torch.tensor([3]))
    graph = torch.export.export(Twice(), inputs).module()
    expected = graph(*inputs)
    assert masks_to_float(graph) == 2
    graph.graph.lint()
    assert [str(n.target) for n in graph.graph.nodes].count("aten.masked_fill.Scalar") == 1
    assert torch.equal(graph(*inputs), expected)
    assert masks_to_float(graph) == 0


def test_only_one_token_on_cuda_is_told_so() -> None:
    def ids(count: int, *, is_cuda: bool) -> SimpleNamespace:
        return SimpleNamespace(is_cuda=is_cuda, numel=lambda: count)

    assert options_for((ids(1, is_cuda=True),)) == OPTIONS
    assert options_for((ids(2, is_cuda=True),)) == options_for((ids(1, is_cuda=False),)) == {}
    assert accepted(OPTIONS) == OPTIONS


class Decode(nn.Module):
    """One query over a cache, twice under a mask of bools, once under an added one, once for a prompt."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        mask = torch.arange(k.shape[2]) <= position[:, None]
        added = torch.zeros(1, k.shape[2])
        return (
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5),
            F.scaled_dot_product_attention(q, k, v, attn_mask=added),
            F.scaled_dot_product_attention(k, k, v, attn_mask=mask),
            F.scaled_dot_product_attention(k, k, v, is_causal=True),
        )


def test_attention_of_one_query_becomes_our_operator() -> None:
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    inputs = (q, k, v, torch.tensor([13]))
    graph = torch.export.export(Decode(), inputs).module()
    expected = graph(*inputs)
    assert attend(graph) == 2
    graph.graph.lint()
    calls = graph.graph.find_nodes(op="call_function", target=torch.ops.dsmoe.attend.default)
    assert [call.args[-1] for call in calls] == [8**-0.5, 0.5]
    for found, wanted in zip(graph(*inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted)


class Attention(nn.Module):
    """Queries, keys and values of one row, one with a bias; an MLP of it; products of three rows and with no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6, bias=False), nn.Linear(8, 4), nn.Linear(8, 4, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*sizes, bias=False) for sizes in ((8, 12), (8, 12), (12, 8)))

    def forward(self, x: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        mlp = self.down(F.silu(self.gate(x)) * self.up(x))
        return self.q(x), self.k(x), self.v(x), mlp, self.q(rows), F.linear(x, weight)


def test_products_of_one_row_become_our_operator() -> None:
    inputs = (torch.randn(1, 1, 8), torch.randn(1, 3, 8), torch.randn(5, 8))
    graph = torch.export.export(Attention(), inputs).module()
    expected = graph(*inputs)
    assert products(graph) == 6
    graph.graph.lint()
    calls = graph.graph.find_nodes(op="call_function", target=torch.ops.dsmoe.gemv.default)
    assert sorted(len(call.args[1]) for call in calls) == [1, 2, 3]  # five read one row: three and two
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)) == 2
    for found, wanted in zip(graph(*inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert products(graph) == 0


def test_products_without_kernels_stay_linear() -> None:
    inputs = tuple(tensor.double() for tensor in (torch.randn(1, 1, 8), torch.randn(1, 3, 8), torch.randn(5, 8)))
    assert products(torch.export.export(Attention().double(), inputs).module()) == 0
