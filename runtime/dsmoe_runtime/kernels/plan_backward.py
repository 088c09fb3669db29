"""How the backward of the experts is cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsmoe_runtime.kernels.plan import Tile


@dataclass(frozen=True)
class BackwardPlan:
    """How the four GEMMs are cut: rows x columns x depth; for wgrad_* depth runs over an expert's rows.

    dgrad_down and dgrad_up have the same block_m: they walk over the same row tiles.
    group: row tiles that run beside each other before the next columns.
    half: a row tile at most half full is computed at half height.
    descriptors: read by TMA what allows it.
    """

    dgrad_down: Tile
    dgrad_up: Tile
    wgrad_gate_up: Tile
    wgrad_down: Tile
    group: int = 8
    half: bool = True
    descriptors: bool = True

    def __post_init__(self) -> None:
        assert self.dgrad_down.block_m == self.dgrad_up.block_m, (self.dgrad_down, self.dgrad_up)


HALF = BackwardPlan(  # the fastest of those timed on an H200 at 4096 and 16384 tokens of the 16B layer: docs/log.md
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 128, 64, 4, 3),
    Tile(128, 128, 64, 8, 3),
)
FLOAT = BackwardPlan(*4 * (Tile(32, 64, 32, 4, 2),), half=False)


def plan_backward(dtype: torch.dtype) -> BackwardPlan:
    """The cut for a dtype; float32 has no tensor cores (its products are exact) and little room in registers."""
    return FLOAT if dtype == torch.float32 else HALF
