"""Which plan a call runs by: a tuned one where a table has it, else the one that the cost model likes best.

T tokens are put into buckets (powers of two, and one and a half times those), so that the number of different kernels,
and of captured graphs, stays small whatever the lengths of the prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch

from dsmoe_runtime.kernels.cost import BYTES, SLACK, pipeline, power, predict, predict_down, predict_up, refusal
from dsmoe_runtime.kernels.gpu import Device, facts, named
from dsmoe_runtime.kernels.plan import Plan, Shape, Tile
from dsmoe_runtime.kernels.tuned import forget_tables, plans

__all__ = [
    "Device",
    "best",
    "bucket",
    "candidates",
    "choose",
    "cuts",
    "facts",
    "named",
    "predict",
    "shape_of",
    "variations",
]

NEAR = 1.05  # a plan tuned for another T is taken if the model gives it at most so much more than its own best
HALF_FROM = 128  # rows: at 64 the second, lower kernel costs more than it saves
BEST_EACH = 4  # tiles of up and of down that are combined, for each regime and height

# rows: (columns, depth, warps, stages) of gate-and-up, whose columns count twice, and of down
HALF: dict[int, tuple[tuple[tuple[int, int, int, int], ...], tuple[tuple[int, int, int, int], ...]]] = {
    16: (
        ((64, 128, 4, 4), (64, 128, 4, 3), (32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 5), (32, 64, 4, 6)),
        ((128, 128, 4, 4), (128, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 3), (128, 64, 4, 4), (32, 128, 4, 5)),
    ),
    32: (
        ((64, 128, 4, 4), (64, 64, 4, 5), (32, 128, 4, 4), (64, 64, 4, 4)),
        ((128, 128, 4, 4), (128, 64, 4, 4), (128, 64, 4, 5), (64, 128, 4, 4)),
    ),
    64: (
        ((64, 64, 4, 4), (128, 64, 8, 4), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 5), (32, 128, 4, 4)),
        ((128, 64, 4, 4), (256, 64, 8, 4), (256, 64, 4, 3), (128, 128, 4, 3), (128, 64, 4, 5), (64, 128, 4, 4)),
    ),
    128: (
        ((128, 64, 8, 4), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 4)),
        ((256, 64, 8, 4), (256, 64, 8, 3), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4)),
    ),
}
FLOAT = {
    16: (((64, 32, 4, 3), (32, 64, 4, 3), (32, 32, 4, 3)), ((64, 64, 4, 3), (64, 32, 4, 3), (128, 32, 4, 2))),
    32: (((64, 32, 4, 2), (32, 32, 4, 3)), ((64, 32, 4, 3), (64, 32, 4, 2), (128, 32, 4, 2))),
    64: (((32, 32, 4, 2), (64, 32, 8, 2)), ((64, 32, 4, 2), (128, 32, 8, 2))),
}
# rows and columns: one row of x times (columns, depth, warps); down asks (stages) experts ahead
PAIRS_UP = (
    (2, 2048, 4), (2, 2048, 8), (4, 2048, 4), (4, 2048, 8), (2, 1024, 4), (4, 1024, 4), (8, 1024, 8), (4, 512, 4),
    (8, 512, 4), (16, 256, 4),
)  # fmt: skip
PAIRS_DOWN = ((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (2, 8), (4, 8), (4, 4), (8, 8))  # columns, warps
PAIRS_DEPTH = 4096  # the widest expert that is asked ahead in one block
PAIRS_EACH = 64  # 16-bit elements of a thread

VARIED: dict[str, tuple[Any, ...]] = {
    "group": (4, 16), "half": (False, True), "ahead": (256,), "tma_rows": (False,), "resident": (2,),
    "specialised": (False, True),
}  # fmt: skip


def bucket(tokens: int) -> int:
    """The number of tokens that a plan is made for: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    whole = 1 << max(0, tokens - 1).bit_length()
    return 3 * whole // 4 if whole >= 4 and tokens <= 3 * whole // 4 else whole


def shape_of(
    tokens: int, hidden: int, width: int, experts: int, top_k: int, dtype: torch.dtype, shared: int = 0
) -> Shape:
    """A call's shape, with its tokens in their bucket."""
    return Shape(bucket(tokens), hidden, width, experts, top_k, str(dtype).removeprefix("torch."), shared)


def choose(shape: Shape, device: Device) -> Plan:
    """The plan to run by, the same for a whole bucket: the user's tuned one, the package's, else the model's best."""
    return _choose(replace(shape, tokens=bucket(shape.tokens)), device)


@lru_cache(maxsize=4096)
def _choose(shape: Shape, device: Device) -> Plan:
    tuned = {tokens: plan for tokens, plan in plans(shape, device).items() if refusal(shape, plan, device) is None}
    if shape.tokens in tuned:
        return tuned[shape.tokens]
    modelled = best(shape, device)
    below = [tokens for tokens in tuned if tokens < shape.tokens]
    above = [tokens for tokens in tuned if tokens > shape.tokens]
    near = [tuned[t] for t in (*(max(b) for b in (below,) if b), *(min(a) for a in (above,) if a))]
    if not near:
        return modelled
    plan = min(near, key=lambda p: predict(shape, p, device))
    return plan if predict(shape, plan, device) <= NEAR * predict(shape, modelled, device) else modelled


def forget() -> None:
    """Read the tables again at the next call: one of them was written."""
    _choose.cache_clear()
    forget_tables()


@lru_cache(maxsize=4096)
def best(shape: Shape, device: Device) -> Plan:
    """What the model likes best, tables aside."""
    return candidates(shape, device)[0]


def candidates(shape: Shape, device: Device) -> list[Plan]:
    """Plans that run this shape on this device, the fastest first as the model has it; never none."""
    found: dict[Plan, float] = {}
    for regime in ("pairs", "scan", "sorted"):
        for up_tiles, down_tiles in cuts(shape, regime, device):
            for up, down in product(up_tiles[:BEST_EACH], down_tiles[:BEST_EACH]):
                plan = Plan(regime, up, down, half=regime == "sorted" and up.block_m >= HALF_FROM)
                if refusal(shape, plan, device) is None:
                    found[plan] = predict(shape, plan, device)
    for plan in sorted(found, key=lambda plan: found[plan]):
        made = replace(plan, specialised=True)
        if refusal(shape, made, device) is None:  # they have one cut, so they are offered once
            found[made] = predict(shape, made, device)
            break
    return sorted(found, key=lambda plan: found[plan])


def variations(shape: Shape, plan: Plan, device: Device) -> list[Plan]:
    """The plan with one of the values changed that the model has no opinion about."""
    if plan.regime != "sorted":
        return []
    changes = [(f.name, value) for f in fields(Plan) for value in VARIED.get(f.name, ())]
    changed = (replace(plan, **{name: value}) for name, value in changes)
    return [p for p in changed if p != plan and refusal(shape, p, device) is None]


def cuts(shape: Shape, regime: str, device: Device) -> list[tuple[list[Tile], list[Tile]]]:
    """For each height of row tiles the tiles of up and of down, each list with the best first as the model has it."""
    slots = shape.tokens * shape.top_k
    if regime == "pairs":
        if slots > max(shape.experts // 2, 2 * shape.top_k):  # beyond, experts are hit twice, and read twice
            return []
        return [(_ranked(shape, regime, _pairs_ups(shape), device, up=True),
                 _ranked(shape, regime, _pairs_downs(shape), device, up=False))]  # fmt: skip
    menu = FLOAT if shape.dtype == "float32" else HALF
    # Taller tiles would be mostly empty; 64 rows are the least that Hopper's fast products take.
    most = min(power(shape.tokens), max(64, power(int(1.3 * slots / shape.experts))))
    made = []
    for rows, (ups, downs) in menu.items():
        if rows > most or (regime == "scan" and rows != 16):
            continue
        up = {_fitted(Tile(rows, *t), 2, shape.width, shape.hidden, shape, device) for t in ups}
        down = {_fitted(Tile(rows, *t), 1, shape.hidden, shape.width, shape, device) for t in downs}
        made.append((_ranked(shape, regime, up, device, up=True), _ranked(shape, regime, down, device, up=False)))
    return made


def _ranked(shape: Shape, regime: str, tiles: Iterable[Tile], device: Device, *, up: bool) -> list[Tile]:
    time = predict_up if up else predict_down
    keyed = {tile: time(shape, Plan(regime, tile, tile), device) for tile in tiles}
    return sorted(keyed, key=lambda t: (keyed[t], t.block_n, t.block_k, t.num_warps, t.num_stages))


def _fitted(tile: Tile, halves: int, n: int, depth: int, shape: Shape, device: Device) -> Tile:
    """The tile, no wider and no deeper than the matrix, in the shared memory that there is."""
    size, columns, deep = BYTES[shape.dtype], min(tile.block_n, power(n)), min(tile.block_k, power(depth))
    tile = replace(tile, block_n=columns, block_k=deep)
    while pipeline(tile, halves, size) > device.shared_memory - SLACK:
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.block_k > 32:
            tile = replace(tile, block_k=tile.block_k // 2)
        else:
            tile = replace(tile, block_n=tile.block_n // 2)
    return tile


def _pairs_ups(shape: Shape) -> set[Tile]:
    return {
        Tile(1, min(n, power(shape.width)), min(k, power(shape.hidden)), warps, 1)
        for n, k, warps in PAIRS_UP
        if n * k * BYTES[shape.dtype] <= 2 * PAIRS_EACH * 32 * warps
    }


def _pairs_downs(shape: Shape) -> set[Tile]:
    """One block of the whole width where that leaves a thread few enough elements, and experts to ask for ahead."""
    deep, size = power(shape.width), BYTES[shape.dtype]
    made = set()
    for n, warps in PAIRS_DOWN:
        each = n * deep // (32 * warps)
        if deep <= PAIRS_DEPTH and each <= PAIRS_EACH:
            room = max(0, (160 - each) * 4 // (max(1, each) * size))  # 160 registers for what is asked for
            made |= {Tile(1, n, deep, warps, ahead) for ahead in (0, 1, 2, 4, 6, 8) if ahead <= min(room, shape.top_k)}
    shallow = min(512, deep)
    return made | {Tile(1, 4, shallow, 4, 0), Tile(1, 2, shallow, 4, 0)}
