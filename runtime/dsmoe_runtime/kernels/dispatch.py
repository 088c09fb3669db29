"""Slots sorted by expert, and the row tiles of a grouped GEMM, on the device; no count ever reaches the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dsmoe_runtime.kernels.device import dispatch as device
from dsmoe_runtime.kernels.launch import chained, launch, tracing

FEW_SLOTS = 8192  # up to here every expert's program reads all ids itself: one launch instead of two
MANY_SLOTS = 32768  # beyond, a program takes four times as many
PART = 128  # slots that are compared with one another


class Rows(NamedTuple):
    """P slots (token * K + k) in the order of their experts, rising within one; int32, on the device.

    slots: `[P]`; those whose expert id is outside [0, E) are absent, and so many entries at the end are undefined.
    offsets: `[E + 2]`, where each expert's slots start, their end, and the number of row tiles.
    tile_expert, tile_row: of each row tile its expert (-1: no tile) and the index into `slots` of its first row.
    """

    slots: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor


def most_tiles(n_slots: int, num_experts: int, block_m: int) -> int:
    """A bound on the row tiles, whatever the routing: every expert that has a slot wastes at most one."""
    return torch.sym_min(num_experts, n_slots) + n_slots // block_m


def carved(parts: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """int32 tensors of so many elements in one allocation; each begins at 16 bytes, so that one binary serves any T."""
    rooms = [-(-part // 4) * 4 for part in parts]
    buffer = torch.empty(sum(rooms), dtype=torch.int32, device=device)
    return [room[:part] for room, part in zip(buffer.split(rooms), parts, strict=True)]


def plan_rows(experts: Tensor, num_experts: int, block_m: int) -> Rows:
    """Sort the slots of `experts [T, K]`, contiguous, by expert; one launch up to 8192 slots, else two."""
    n_slots, device_ = experts.numel(), experts.device
    n_tiles = most_tiles(n_slots, num_experts, block_m)
    # One allocation: four small ones cost more time on the host than the kernel takes.
    parts = (n_slots, num_experts + 2, n_tiles, n_tiles)
    if tracing():  # a graph plans its memory ahead, and copies what is written through a view
        rows = Rows(*(torch.empty(part, dtype=torch.int32, device=device_) for part in parts))
    else:
        rows = Rows(*carved(parts, device_))
    if isinstance(n_slots, int) and n_slots == 0:
        rows.offsets.zero_()
        return rows
    e_pad, pdl = triton.next_power_of_2(num_experts), chained(device_)
    if n_slots <= FEW_SLOTS:
        launch(
            device.sort_few, (num_experts + 1,), experts, *rows, n_slots, n_tiles,
            E=num_experts, E_PAD=e_pad, BLOCK_M=block_m, CHUNK=1024 if n_slots <= 1024 else 4096, PDL=pdl,
            num_warps=4 if n_slots <= 1024 else 8, pdl=pdl,
        )  # fmt: skip
        return rows
    chunk = 2 * PART if n_slots <= MANY_SLOTS else 8 * PART  # few chunks: each looks at the counts of all
    n_chunks = triton.cdiv(n_slots, chunk)
    counts = torch.empty(n_chunks * e_pad, dtype=torch.int32, device=device_)
    launch(
        device.count, (n_chunks,), experts, counts, n_slots,
        E=num_experts, E_PAD=e_pad, CHUNK=chunk, PDL=pdl, num_warps=4, pdl=pdl,
    )  # fmt: skip
    launch(
        device.place, (n_chunks,), experts, counts, *rows, n_slots, n_chunks, n_tiles,
        E=num_experts, E_PAD=e_pad, BLOCK_M=block_m, CHUNK=chunk, PART=PART, TILES=max(16, min(128, 8192 // e_pad)),
        ROWS=max(16, 8192 // e_pad), PDL=pdl, num_warps=8, pdl=pdl,
    )  # fmt: skip
    return rows
