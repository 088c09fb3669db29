"""One expert for every token: the same rows as a sort of ids that are all zero, and so the same answers."""

from __future__ import annotations

import pytest
import torch

from dsmoe_runtime.agreement import within_budget
from dsmoe_runtime.kernels.dispatch import plan_rows
from dsmoe_runtime.kernels.experts import Weights
from dsmoe_runtime.kernels.moe import rows_in_order, shared_experts, shared_sorted
from dsmoe_runtime.kernels.plan import Plan, Tile

ON = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


@ON
@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 128, 300, 1024, 2500])
def test_rows_are_those_of_a_sort(device, block_m, tokens):
    """But for the first rows of tiles that there are not, which nobody reads."""
    made = rows_in_order(tokens, block_m, torch.device(device))
    wanted = plan_rows(torch.zeros(tokens, 1, dtype=torch.int64, device=device), 1, block_m)
    tiles = int(wanted.offsets[2])
    assert torch.equal(made.slots, wanted.slots)
    assert torch.equal(made.offsets, wanted.offsets)
    assert torch.equal(made.tile_expert, wanted.tile_expert)
    assert torch.equal(made.tile_row[:tiles], wanted.tile_row[:tiles])


@ON
@pytest.mark.parametrize("gated", [True, False])
def test_shared_experts_by_our_kernels(device, gated):
    """As the dense MLP that the vendor's library computes."""
    generator, (tokens, hidden, width) = torch.Generator().manual_seed(1), (50, 40, 24)
    x, gate_up, down = (
        torch.randn(size, generator=generator).to(device)
        for size in ((tokens, hidden), ((2 if gated else 1) * width, hidden), (hidden, width))
    )
    activation = "silu" if gated else "gelu"
    w = Weights.of(gate_up[None], down[None], None, None, activation, 1.0, 0.0, "concat" if gated else "ungated")
    y = shared_sorted(x, w, Plan("sorted", Tile(16, 16, 16, 4, 2), Tile(16, 16, 16, 4, 2)))
    joint = x.double() @ gate_up.double().T
    inner = torch.nn.functional.silu(joint[:, :width]) * joint[:, width:] if gated else None
    exact = (torch.nn.functional.gelu(joint) if inner is None else inner) @ down.double().T
    eager = shared_experts(x, gate_up, down, activation, 1.0, 0.0)
    found = within_budget(y, eager=eager, exact=exact, factor=4.0)
    assert found.ok, found
