"""The order of the slots and the row tiles, by both paths, to the integer; and that nothing else is written."""

from __future__ import annotations

import pytest
import torch

from dsmoe_runtime.kernels import dispatch
from dsmoe_runtime.kernels.launch import INTERPRETED
from tests.kernels.conftest import POISON

BLOCK_M = 16


@pytest.fixture(params=["one launch", "two launches"])
def path(request, monkeypatch) -> str:
    """The path for few slots, and the one for many, at a size that an interpreter can do."""
    monkeypatch.setattr(dispatch, "FEW_SLOTS", 2**40 if request.param == "one launch" else -1)
    return request.param


def ids_of(tokens: int, top_k: int, num_experts: int, kind: str = "uniform") -> torch.Tensor:
    """Expert ids `[T, K]`: uniform, one expert's alone, skewed, or with a third of them out of range."""
    generator = torch.Generator().manual_seed(tokens + num_experts)
    ids = torch.randint(0, num_experts, (tokens, top_k), generator=generator)
    if kind == "one expert":
        ids.fill_(num_experts // 2)
    elif kind == "skewed":
        share = 1 / torch.arange(1, num_experts + 1)
        ids = torch.multinomial(share, max(1, ids.numel()), replacement=True, generator=generator)[: ids.numel()]
        ids = ids.view(tokens, top_k)
    elif kind == "out of range":
        out = torch.tensor([-1, num_experts, 2**31 - 1, -(2**31), 2**32])
        away = torch.rand(ids.shape, generator=generator) < 0.3
        ids = torch.where(away, out[torch.randint(0, 5, ids.shape, generator=generator)], ids)
    return ids


def expected(ids: torch.Tensor, num_experts: int, block_m: int) -> tuple[list[int], ...]:
    """slots, offsets, tile_expert and tile_row as plain lists."""
    of_expert = [(ids.flatten() == e).nonzero()[:, 0].tolist() for e in range(num_experts)]
    offsets, tiles = [0], []
    for e, own in enumerate(of_expert):
        tiles += [(e, offsets[-1] + row) for row in range(0, len(own), block_m)]
        offsets.append(offsets[-1] + len(own))
    slots = [slot for own in of_expert for slot in own]
    return slots, [*offsets, len(tiles)], [e for e, _ in tiles], [row for _, row in tiles]


def complaint(rows: dispatch.Rows, ids: torch.Tensor, num_experts: int, block_m: int) -> str | None:
    """What is wrong with `rows`, or None."""
    slots, offsets, experts, first_rows = expected(ids, num_experts, block_m)
    found = dispatch.Rows(*(part.tolist() for part in rows))
    most = dispatch.most_tiles(ids.numel(), num_experts, block_m)
    if (len(found.slots), len(found.tile_expert), len(found.tile_row)) != (ids.numel(), most, most):
        return "lengths"
    if found.offsets != offsets:
        return f"offsets {found.offsets}, not {offsets}"
    if found.slots[: len(slots)] != slots:
        return f"slots {found.slots}, not {slots}"
    if any(slot != POISON for slot in found.slots[len(slots) :]):
        return "slots that are skipped have a place in the order"
    if found.tile_expert != experts + [-1] * (most - len(experts)) or found.tile_row[: len(first_rows)] != first_rows:
        return f"tiles {found.tile_expert} at {found.tile_row}, not {experts} at {first_rows}"
    return None


def plan_rows(device: str, ids: torch.Tensor, num_experts: int, block_m: int = BLOCK_M) -> dispatch.Rows:
    return dispatch.Rows(*(part.cpu() for part in dispatch.plan_rows(ids.to(device), num_experts, block_m)))


@pytest.mark.parametrize(
    ("num_experts", "kind"),
    [(1, "uniform"), (1, "out of range"), (5, "uniform"), (5, "one expert"), (5, "out of range"), (63, "skewed")],
)
def test_every_routing(device, path, poison, num_experts, kind):
    """T K = 259, which no chunk divides; 63 experts leave some without a token, and one expert leaves all others."""
    ids = ids_of(37, 7, num_experts, kind)
    for dtype in (torch.int64, torch.int32)[: 2 if num_experts == 5 else 1]:
        assert not complaint(plan_rows(device, ids.to(dtype), num_experts), ids.to(dtype), num_experts, BLOCK_M)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (1, 2), (3, 1), (16, 1), (17, 15)], ids=str)
def test_any_number_of_slots(device, path, poison, shape):
    if shape[0] == 0 and path == "two launches":
        pytest.skip("no slot, no launch")
    ids = ids_of(*shape, 5)
    assert not complaint(plan_rows(device, ids, 5), ids, 5, BLOCK_M)


def test_no_slot_of_any_expert(device, path, poison):
    """Nothing but ids out of range: no tile, and no slot in the order."""
    ids = torch.tensor([[-1, 5], [7, -3]])
    rows = plan_rows(device, ids, 5)
    assert not complaint(rows, ids, 5, BLOCK_M)
    assert rows.offsets.tolist() == [0] * 7


@pytest.mark.parametrize("block_m", [16, 32, 128])
def test_rows_of_each_expert_around_a_tile(device, path, poison, block_m):
    """Whole tiles, one row less and one row more, and more than one chunk of slots."""
    counts = [block_m, block_m - 1, 0, block_m + 1, 2 * block_m]
    ids = torch.arange(5).repeat_interleave(torch.tensor(counts))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))][:, None]
    rows = plan_rows(device, ids, 5, block_m)
    assert not complaint(rows, ids, 5, block_m)
    assert int(rows.offsets[-1]) == 1 + 1 + 0 + 2 + 2


def test_the_bound_on_tiles_is_reached_and_never_passed():
    """Each expert with one row more than whole tiles is the worst case, so a grid from the bound is large enough."""
    for block_m in (16, 64):
        for num_experts in (1, 5, 63):
            ids = torch.arange(num_experts).repeat_interleave(block_m + 1)[:, None]
            tiles = len(expected(ids, num_experts, block_m)[2])
            assert tiles == 2 * num_experts
            assert tiles <= dispatch.most_tiles(len(ids), num_experts, block_m) <= tiles + num_experts


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="no GPU here")
@pytest.mark.parametrize("num_experts", [64, 63, 512])
@pytest.mark.parametrize("slots", [8192, 8193, 100_003])
def test_both_sides_of_the_change_of_path(device, poison, num_experts, slots):
    """Neither side is as quick in an interpreter; the choice between them is the module's own."""
    for kind in ("skewed", "out of range"):
        ids = ids_of(slots, 1, num_experts, kind)
        assert not complaint(plan_rows(device, ids, num_experts, 128), ids, num_experts, 128)


def test_the_judge_sees_planted_faults(device, path, poison):
    ids = ids_of(40, 3, 5)
    rows = plan_rows(device, ids, 5)
    assert not complaint(rows, ids, 5, BLOCK_M)
    swapped, last = rows.slots.clone(), int(rows.offsets[-1]) - 1
    swapped[[0, 1]] = swapped[[1, 0]]  # right expert, not the order: sums would differ from run to run
    assert "slots" in complaint(rows._replace(slots=swapped), ids, 5, BLOCK_M)
    for name, index, value in (("offsets", 2, 0), ("tile_expert", last, -1), ("tile_row", 1, 0)):
        spoilt = getattr(rows, name).clone()
        spoilt[index] = value
        assert complaint(rows._replace(**{name: spoilt}), ids, 5, BLOCK_M), name
