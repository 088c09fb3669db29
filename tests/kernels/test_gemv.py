"""dsmoe::gemv's kernel against float64: one to three weights, sizes that no block divides, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dsmoe_runtime.ops  # noqa: F401  registers the operator
from dsmoe_runtime.agreement import assert_within_budget, within_budget
from dsmoe_runtime.errors import CaptureError, InputError
from dsmoe_runtime.kernels.gemv import MANY, gemv, tile_of
from dsmoe_runtime.ops.cuda import why_not

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("poison")


def case(rows: tuple[int, ...], depth: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(depth)
    x = torch.randn(1, 1, depth, generator=generator).to(dtype)
    return x, [(torch.randn(n, depth, generator=generator) * depth**-0.5).to(dtype) for n in rows]


def run(device: str, x: Tensor, weights: list[Tensor]) -> Tensor:
    if device == "cpu":
        return gemv(x, weights)
    return torch.ops.dsmoe.gemv(x.to(device), [w.to(device) for w in weights]).cpu()  # type: ignore[no-any-return]


def references(x: Tensor, weights: list[Tensor]) -> dict[str, Tensor]:
    """By eager in the same dtype and by float64, as rows of 64 values."""

    def rows(dtype: torch.dtype) -> Tensor:
        return in_rows(torch.cat([F.linear(x.to(dtype), w.to(dtype)) for w in weights], -1))

    return {"eager": rows(x.dtype), "exact": rows(torch.float64)}


def in_rows(y: Tensor) -> Tensor:
    return F.pad(y.flatten(), (0, -y.numel() % 64), value=1.0).reshape(-1, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "depth"),
    [((1,), 1), ((70,), 24), ((33, 20), 300), ((64, 7, 13), 128), ((5,), 5000), ((MANY, 3, 2), 1100), ((9, 1, 3), 7)],
)
def test_against_float64(device: str, rows: tuple[int, ...], depth: int, dtype: torch.dtype) -> None:
    x, weights = case(rows, depth, dtype)
    y = run(device, x, weights)
    assert y.dtype == dtype
    assert y.shape == (1, 1, sum(rows))
    assert_within_budget(in_rows(y), **references(x, weights))


def test_the_rule_sees_planted_faults() -> None:
    x, weights = case((64, 64, 64), 128, torch.bfloat16)
    y, references_ = gemv(x, weights), references(x, weights)
    assert within_budget(in_rows(y), **references_).ok
    swapped, unwritten, short = y.clone(), y.clone(), x.clone()
    swapped[..., :128] = y[..., :128].roll(64)
    unwritten[..., -1] = 0
    short[..., -16:] = 0
    for fault in (swapped, unwritten, torch.zeros_like(y), y * 1.02, gemv(short, weights)):
        assert not within_budget(in_rows(fault), **references_).ok


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_chain_in_a_graph_has_the_same_bits_on_every_run() -> None:
    """Each is launched before the one that it reads has ended."""
    x, weights = case((2048,) * 3, 2048, torch.bfloat16)
    x, weights = x.cuda(), [w.cuda() for w in weights]

    def chain(y: Tensor) -> Tensor:
        for _ in range(20):
            y = torch.ops.dsmoe.gemv(torch.ops.dsmoe.gemv(y, weights)[..., 4096:], weights[:1])
        return y

    expected, graph = chain(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for _ in range(100):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (2048, 2048), (102400, 2048), (2048, 10944), (64, 40)])
def test_tiles_are_powers_of_two_no_wider_than_a_row(rows: int, depth: int) -> None:
    for size in (tile := tile_of(rows, depth)):
        assert size & (size - 1) == 0
    assert tile[1] < 2 * depth


def test_the_operator_is_the_rule_on_a_cpu_and_checks_its_arguments() -> None:
    x, weights = case((5, 3), 8, torch.float32)
    expected = torch.cat([F.linear(x, w) for w in weights], -1)
    assert torch.equal(torch.ops.dsmoe.gemv(x, weights), expected)
    torch.library.opcheck(torch.ops.dsmoe.gemv.default, (x, weights))
    for wrong in ((x.repeat(1, 2, 1), weights), (x, [weights[0].bfloat16()]), (x[..., :4], weights), (x, [x])):
        with pytest.raises(InputError, match=r"one row x \[..., K\] and weights \[N, K\] of its dtype"):
            torch.ops.dsmoe.gemv(*wrong)
    for count in (0, 4):
        with pytest.raises(InputError, match=f"1 to 3 weights, not {count}"):
            torch.ops.dsmoe.gemv(x, count * weights[:1])
    with pytest.raises(CaptureError, match="Differentiate linear"):
        torch.ops.dsmoe.gemv(x.requires_grad_(), weights).sum().backward()


def test_what_the_kernel_refuses() -> None:
    x, weights = case((5, 3), 8, torch.float32)
    assert why_not("gemv", (x, weights)) is None
    assert "side by side" in str(why_not("gemv", (x, [weights[0], torch.empty(8, 3).mT])))
    assert "float64" in str(why_not("gemv", (x.double(), weights)))
