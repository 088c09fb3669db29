"""Attention of one new token from its projections, against float64: first, middle and last slots, grouped heads."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dsmoe_runtime.agreement import assert_within_budget, within_budget
from dsmoe_runtime.kernels.decode_attention import decode_attention, refusal

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("poison")


class Case(NamedTuple):
    qkv: Tensor
    cos: Tensor
    sin: Tensor
    position: Tensor
    key: Tensor
    value: Tensor

    @property
    def scale(self) -> float:
        return float(self.key.shape[-1] ** -0.5)

    def on(self, device: str) -> Case:
        return Case(*(tensor.to(device, copy=True) for tensor in self))

    def wide(self) -> Case:
        return Case(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in self))


def case(heads: int, groups: int, slots: int, width: int, position: int, dtype: torch.dtype) -> Case:
    """What lies in slots that are not read is NaN."""
    generator = torch.Generator().manual_seed(slots)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    angles = torch.arange(slots + 3)[:, None] * 100.0 ** -(torch.arange(width // 2) / width)
    key, value = made(1, groups, slots, width), made(1, groups, slots, width)
    key[:, :, position:], value[:, :, position:] = torch.nan, torch.nan
    qkv = made(1, 1, (heads + 2 * groups) * width)
    return Case(qkv, angles.cos().to(dtype), angles.sin().to(dtype), torch.tensor([position]), key, value)


def rule(given: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The answers `[A, D]`, and the new key and value `[G, D]`, in plain torch."""
    groups, _, width = given.key.shape[1:]
    at = int(given.position)
    parts = given.qkv.view(-1, width)
    heads = len(parts) - 2 * groups
    half = torch.cat([-parts[..., width // 2 :], parts[..., : width // 2]], -1)
    turned = parts * given.cos[at].repeat(2) + half * given.sin[at].repeat(2)
    new_key, new_value = turned[heads : heads + groups], parts[heads + groups :]
    key, value = (
        torch.cat([old[0, :, :at], new[:, None]], 1).repeat_interleave(heads // groups, 0)
        for old, new in ((given.key, new_key), (given.value, new_value))
    )
    y = F.scaled_dot_product_attention(turned[:heads, None], key, value, scale=given.scale)
    return y[:, 0], new_key, new_value


def check(device: str, given: Case) -> Case:
    """The cache as it is left."""
    here, at = given.on(device), int(given.position)
    y = decode_attention(*here, given.scale).cpu()
    kept = here.on("cpu")
    width = given.key.shape[-1]
    found = (y.view(-1, width), kept.key[0, :, at], kept.value[0, :, at])
    for ours, eager, exact in zip(found, rule(given), rule(given.wide()), strict=True):
        assert ours.dtype == given.qkv.dtype
        assert_within_budget(ours, eager=eager, exact=exact)
    for before, after in ((given.key, kept.key), (given.value, kept.value)):
        others = [slot for slot in range(given.key.shape[2]) if slot != at]
        assert torch.equal(before[:, :, others].nan_to_num(9.0), after[:, :, others].nan_to_num(9.0))
    return kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "groups", "slots", "width", "position"),
    [(2, 2, 1, 16, 0), (3, 3, 70, 24, 69), (4, 2, 300, 128, 150), (6, 1, 2100, 6, 2099), (2, 2, 40, 64, 16)],
)
def test_against_float64(device, heads: int, groups: int, slots: int, width: int, position: int, dtype) -> None:
    check(device, case(heads, groups, slots, width, position, dtype))


def test_steps_in_a_row(device: str) -> None:
    """Each reads what the one before wrote, over the border of a part."""
    given = case(4, 2, 40, 32, 0, torch.float32)
    for step in range(18):
        kept = check(device, given)
        fresh = torch.randn(given.qkv.shape, generator=torch.Generator().manual_seed(step))
        given = kept._replace(qkv=fresh, position=torch.tensor([step + 1]))


def test_the_rule_sees_planted_faults(device: str) -> None:
    given = case(4, 2, 40, 32, 20, torch.float32)
    eager, exact = rule(given)[0], rule(given.wide())[0]
    faults = (
        given._replace(cos=given.sin, sin=given.cos),
        given._replace(position=torch.tensor([19])),
        given._replace(qkv=given.qkv.roll(32, -1)),
        given._replace(value=given.value.roll(1, 2).nan_to_num(0.0)),
    )
    for number, fault in enumerate((given, *faults)):
        y = decode_attention(*fault.on(device), given.scale).cpu().view(-1, 32)
        assert within_budget(y, eager=eager, exact=exact).ok == (number == 0), number


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_one_graph_for_every_position() -> None:
    """Positions are read on the GPU: a captured step serves all of them, with the same bits on every run."""
    given = case(16, 16, 600, 128, 512, torch.bfloat16)
    here, graph = given.on("cuda"), torch.cuda.CUDAGraph()
    decode_attention(*here, given.scale)
    with torch.cuda.graph(graph):
        y = decode_attention(*here, given.scale)
    for position in (512, 513, 514, 512):
        here.position.fill_(position)
        graph.replay()
        now = given._replace(position=torch.tensor([position]), key=here.key.cpu(), value=here.value.cpu())
        eager, exact = rule(now)[0], rule(now.wide())[0]
        assert_within_budget(y.cpu().view(-1, 128), eager=eager, exact=exact)
        kept = y.clone()
        for _ in range(20):
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, kept)


def test_what_the_kernels_refuse() -> None:
    assert refusal(16, 4, 128) is None
    assert "16 heads of queries are no multiple of 3" in str(refusal(16, 3, 128))
    for width in (300, 7):
        assert f"{width} wide" in str(refusal(2, 2, width))
