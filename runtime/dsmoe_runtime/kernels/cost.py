"""How long a plan will take, from sizes and the device alone: bytes and products, held up by what a tile can hide.

Constants are fitted to 66 timings of single kernels on an H200 (16B and 2B shapes, T = 64 to 16384): 6 % rms, and in
each of the ten groups the tile that the model likes best is the best one measured.
Of "pairs" it knows less (1299 timings of seven layers, T = 1, 2 and 4): its favourite tiles of up take 1.4 % more than
the best of ten on average, those of down 2.5 % more than the best of up to 65, at most 6 and 10 %; there tuning pays.

A slot is one of the T K pairs of a token and an expert.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from dsmoe_runtime.kernels.gpu import Device
from dsmoe_runtime.kernels.plan import REGIMES, Plan, Shape, Tile

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SCAN_SLOTS = 1024  # the ids are one block there
SLACK = 2048  # bytes of shared memory that a kernel takes beside its pipeline
SLOWEST_START = 5.0  # us from the end of the kernel before to full speed, and from there to the last program's end
LAUNCH = 2.0  # us of a short kernel, chained
IN_FLIGHT, SATURATION = 16e3, 1.2  # bytes asked for ahead, on each multiprocessor, that fetch at half of 1.2
HALF_AREA = 6500  # elements of accumulators on a multiprocessor at which half of the products' rate is reached
SMALL_ROWS = 0.78  # of the rate, for products of 16 and 32 rows, which are no warpgroup's
NARROW, THREE_STAGES, TALL, SMALL_EIGHT_WARPS = 0.95, 0.90, 0.90, 0.87
SPECIALISED_ROWS, SPECIALISED = 448, (1.02, 0.94)  # time of specialised kernels, from so many rows an expert on: V3's
# experts (88 MB each, beyond the L2 cache) took 27.9 ms in them at 512 rows and 20.8 ms in the others


class Stream(NamedTuple):
    """How a kernel of matrices times vectors reads: fitted, for up and for down."""

    half: float  # of IN_FLIGHT, that fetches at half of `saturation`
    saturation: float
    spilled: float  # registers of a thread from which on they spill
    wave: float  # us in which a program has nothing in flight: waiting for its first answer, summing across the warps
    step: float  # and between two steps
    uneven: float  # of a last wave that is not full, what is paid


UP_STREAM, DOWN_STREAM = Stream(0.245, 1.1, 1376, 0.23, 0.2, 0.066), Stream(1.186, 1.2, 168, 0.39, 0.64, 0.107)
CHAINED = 0.8  # of the two kernels' times apart: the second reads ahead while the first ends
SHARPNESS = 2.8  # how far memory and products hide each other: 1 adds, infinity takes the longer
FLOAT_SHARE = 0.5  # of the float32 rate that an exact tl.dot reaches


def power(number: int) -> int:
    """The smallest power of two that is at least `number`, and at least 16: what a block of it takes."""
    return max(16, 1 << max(0, number - 1).bit_length())


def refusal(shape: Shape, plan: Plan, device: Device) -> str | None:
    """Why this plan cannot run, or None."""
    if plan.regime not in REGIMES:
        return f"regime {plan.regime!r} is none of {', '.join(REGIMES)}"
    if plan.up.block_m != plan.down.block_m:
        return f"up has {plan.up.block_m} rows, down {plan.down.block_m}: both work on the same row tiles"
    if plan.regime == "scan" and shape.tokens * shape.top_k > SCAN_SLOTS:
        return f"scan takes at most {SCAN_SLOTS} slots, not {shape.tokens * shape.top_k}"
    if plan.regime == "pairs" and plan.down.num_stages and plan.down.block_k < shape.width:
        return f"down asks ahead in one block, and {plan.down.block_k} is less than the width {shape.width}"
    if plan.half and (plan.regime != "sorted" or plan.up.block_m < 32):
        return f"half of {plan.up.block_m} rows: sorted tiles of at least 32 rows can be halved"
    if plan.specialised:
        if plan.regime != "sorted" or plan.up.block_m != 128:
            return f"specialised kernels take sorted tiles of 128 rows, not {plan.regime} of {plan.up.block_m}"
        if not device.wgmma or shape.dtype == "float32":
            return f"specialised kernels multiply 16 bits on Hopper, not {shape.dtype} on {device.name}"
        if shape.hidden % 8 or shape.width % 8:
            return f"specialised kernels copy 16 bytes at a time; {shape.hidden} and {shape.width} must divide by 8"
    for name, tile, halves in (("up", plan.up, 2), ("down", plan.down, 1)):
        blocks = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)
        if any(block < 1 or block & (block - 1) for block in blocks) or tile.num_stages < 0:
            return f"{name}: blocks and warps must be powers of two, not {blocks}"
        if plan.regime == "pairs":
            continue
        if min(blocks[:3]) < 16 or tile.num_stages < 1:
            return f"{name}: tl.dot takes blocks of at least 16, and a stage"
        if held(tile, halves) > 128:
            return f"{name}: {held(tile, halves)} accumulators a thread; 128 fit"
        used = pipeline(tile, halves, BYTES[shape.dtype])
        if used > device.shared_memory - SLACK:
            return f"{name}: {used} bytes of shared memory; {device.name} has {device.shared_memory}"
    return None


def held(tile: Tile, halves: int) -> int:
    """Accumulators of a thread; halves: 2 for gate and up, 1 for down."""
    return tile.block_m * tile.block_n * halves // (32 * tile.num_warps)


def pipeline(tile: Tile, halves: int, size: int) -> int:
    """Bytes of shared memory of all stages, at most: products of fewer than 64 rows do without one of them."""
    return tile.num_stages * (tile.block_m + tile.block_n * halves) * tile.block_k * size


def resident(registers: int, shared: int, tile: Tile, device: Device) -> int:
    """Programs that a multiprocessor holds, with so many registers a thread and bytes of shared memory."""
    by_registers = device.registers // (32 * tile.num_warps * min(registers, 255))
    by_memory = device.shared_memory_each // (shared + 1024) if shared else 32
    return max(1, min(by_registers, by_memory, 2048 // (32 * tile.num_warps), 32))


def distinct(shape: Shape) -> float:
    """Experts hit, for uniform and independent routing."""
    return shape.experts * (1 - (1 - min(1.0, shape.top_k / shape.experts)) ** shape.tokens)


@lru_cache(maxsize=4096)
def row_tiles(tokens: int, experts: int, top_k: int, block_m: int) -> float:
    """Row tiles, for uniform routing: an expert has a binomial number of rows and wastes the rest of its last tile."""
    share = min(1.0, top_k / experts)
    mean, spread = tokens * share, math.sqrt(tokens * share * (1 - share))
    return experts * sum(_more(n, mean, spread) for n in range(0, int(mean + 6 * spread) + 2, block_m))


def _more(n: int, mean: float, spread: float) -> float:
    """The probability of more than n rows: a normal curve, or Poisson's for few."""
    if mean > 30:
        return float(n < mean) if spread == 0 else 0.5 * math.erfc((n + 0.5 - mean) / (spread * math.sqrt(2)))
    term = total = math.exp(-mean)
    for i in range(1, n + 1):
        term *= mean / i
        total += term
    return max(0.0, 1 - total)


def predict(shape: Shape, plan: Plan, device: Device) -> float:
    """Microseconds of a call, cold weights, launches from a graph."""
    if shape.tokens == 0:
        return 0.0
    parts = predict_up(shape, plan, device) + predict_down(shape, plan, device)
    if plan.regime == "pairs":
        return CHAINED * parts
    size, slots = BYTES[shape.dtype], shape.tokens * shape.top_k
    if plan.specialised:
        fits = 3 * shape.width * shape.hidden * size <= device.l2_bytes
        parts *= SPECIALISED[fits and slots >= SPECIALISED_ROWS * shape.experts]
    combine = LAUNCH + 1e6 * (slots + shape.tokens) * shape.hidden * size / device.bandwidth
    return parts + combine + (_sort(slots) if plan.regime == "sorted" else 0.0)


def predict_up(shape: Shape, plan: Plan, device: Device) -> float:
    """Microseconds of gate-and-up with its activation."""
    if plan.regime == "pairs":
        return _pairs_up(shape, plan.up, device)
    return _product(shape, plan, plan.up, 2, shape.width, shape.hidden, device)


def predict_down(shape: Shape, plan: Plan, device: Device) -> float:
    """Microseconds of down; for pairs the weighted sum is in it."""
    if plan.regime == "pairs":
        return _pairs_down(shape, plan.down, device)
    return _product(shape, plan, plan.down, 1, shape.hidden, shape.width, device)


def _sort(slots: int) -> float:
    """Microseconds of dispatch, measured: 3.5 at 384 slots, 6.7 at 3072; then, in two launches, 28 at 24576."""
    return 3.1 + 1.2e-3 * slots if slots <= 8192 else 20 + 2.6e-4 * slots


def _product(shape: Shape, plan: Plan, tile: Tile, halves: int, n: int, depth: int, device: Device) -> float:
    """Microseconds of one grouped product of depth `depth`; halves times n columns of weights."""
    size, slots = BYTES[shape.dtype], shape.tokens * shape.top_k
    tiles, columns = row_tiles(shape.tokens, shape.experts, shape.top_k, tile.block_m), -(-n // tile.block_n)
    hit = distinct(shape)
    programs = columns * (hit if plan.regime == "scan" else tiles)
    memory = pipeline(tile, halves, size)
    together = resident(held(tile, halves) + 48, memory, tile, device)
    busy = min(together, programs / device.multiprocessors)

    ahead = max(1, min(tile.num_stages - 1, -(-depth // tile.block_k)))
    flight = ahead * tile.block_n * halves * tile.block_k * size * busy
    bandwidth = device.bandwidth * min(1.0, SATURATION * flight / (flight + _in_flight(device)))
    bandwidth *= _aligned(depth * size)
    moved = hit * halves * n * depth * size + 0.5 * slots * (n + depth) * size
    moved += 0.05 * programs * tile.block_m * depth * size  # rows, once for each block of columns, from the L2
    reading = 1e6 * moved / bandwidth

    rows = tiles * tile.block_m
    if plan.half:  # a last tile that is at most half full
        rows = row_tiles(shape.tokens, shape.experts, shape.top_k, tile.block_m // 2) * (tile.block_m // 2)
    height = rows / tiles  # of the tiles as they are computed, on average
    work = rows * columns * tile.block_n * halves * depth * 2
    waves = programs / (device.multiprocessors * together)
    uneven = math.ceil(waves) / waves if waves < 2 else 1 + 0.4 / waves
    multiplying = 1e6 * work / _rate(shape, tile, height, halves, busy, device) * uneven
    looking = 0.0
    if plan.regime == "scan":  # each program looks through all ids, once for every row tile
        looking = 8e-6 * power(slots) ** 2 * tiles * columns / (device.multiprocessors * together)
    return float((reading**SHARPNESS + multiplying**SHARPNESS) ** (1 / SHARPNESS)) + looking + SLOWEST_START


def _rate(shape: Shape, tile: Tile, height: float, halves: int, busy: float, device: Device) -> float:
    """FLOP/s that these tiles reach."""
    area = height * tile.block_n * halves
    if shape.dtype == "float32":
        return device.float_rate * FLOAT_SHARE * area * busy / (area * busy + 1024)
    if not device.wgmma:  # smaller products, more of them at a time
        return device.matrix_rate * area * busy / (area * busy + HALF_AREA / 2)
    if tile.block_m < 64:
        return device.matrix_rate * SMALL_ROWS * tile.block_m / (tile.block_m + HALF_AREA / 128)
    rate = device.matrix_rate * area * busy / (area * busy + HALF_AREA)
    if tile.block_n < 128:
        rate *= NARROW
    if tile.num_warps == 8 and min(height, tile.block_n) < 96:  # two warpgroups share what is enough for one
        rate *= SMALL_EIGHT_WARPS
    return rate * (THREE_STAGES if tile.num_stages < 4 else 1.0) * (TALL if tile.block_m > 128 else 1.0)


def _in_flight(device: Device) -> float:
    """Bytes that a multiprocessor must have asked for: an H200's, in proportion to its share of the bandwidth."""
    return IN_FLIGHT * (device.bandwidth / device.multiprocessors) / (4.54e12 / 132)


def _aligned(row_bytes: int) -> float:
    """Share of the bandwidth for rows that begin at odd places: narrow loads, no copy engine."""
    step = math.gcd(row_bytes, 16)
    return 1.0 if step == 16 else 0.85 if step >= 4 else 0.45


def _pairs_up(shape: Shape, tile: Tile, device: Device) -> float:
    size, slots = BYTES[shape.dtype], shape.tokens * shape.top_k
    each = tile.block_n * min(tile.block_k, power(shape.hidden)) / (32 * tile.num_warps)
    programs = slots * -(-shape.width // tile.block_n)
    moved = _read_by_pairs(shape, 2 * shape.width * shape.hidden * size, device)
    flight = 2 * tile.block_n * min(tile.block_k, shape.hidden) * size
    steps = -(-shape.hidden // tile.block_k)  # in one step the sums need no registers beside the products
    registers = 2 * each * (size / 4 + (1 if steps > 1 else 0.5)) + 40
    return _vector(moved, flight, programs, registers, shape.hidden * size, tile, device, UP_STREAM, steps)


def _pairs_down(shape: Shape, tile: Tile, device: Device) -> float:
    size = BYTES[shape.dtype]
    each = tile.block_n * tile.block_k / (32 * tile.num_warps)
    ahead = min(shape.top_k, tile.num_stages) if tile.block_k >= shape.width else 0
    programs = shape.tokens * -(-shape.hidden // tile.block_n)
    moved = _read_by_pairs(shape, shape.width * shape.hidden * size, device)
    flight = max(1, ahead) * tile.block_n * min(tile.block_k, shape.width) * size
    registers = each * (1 + ahead * size / 4) + 40
    return _vector(moved, flight, programs, registers, shape.width * size, tile, device, DOWN_STREAM, 1)


def _read_by_pairs(shape: Shape, expert_bytes: float, device: Device) -> float:
    """Bytes from memory: an expert hit twice is read twice, but for what the L2 still holds."""
    once = distinct(shape) * expert_bytes
    again = shape.tokens * shape.top_k * expert_bytes - once
    return once + again * min(1.0, max(0.3, once / device.l2_bytes))


def _vector(
    moved: float,
    flight: float,
    programs: int,
    registers: float,
    row: int,
    tile: Tile,
    device: Device,
    s: Stream,
    steps: int,
) -> float:
    """Microseconds of a kernel of matrices times vectors; what does not fit in registers is spilled, and slow."""
    together = resident(int(registers), 0, tile, device)
    busy = min(together, programs / device.multiprocessors)
    asked = flight * busy
    bandwidth = device.bandwidth * min(1.0, s.saturation * asked / (asked + s.half * _in_flight(device)))
    bandwidth *= _aligned(row)
    spilled = max(1.0, registers / s.spilled)
    waves = programs / (device.multiprocessors * together)
    uneven = 1 + s.uneven * (math.ceil(waves) / waves - 1) if waves > 1 else 1.0
    ends = (s.wave + s.step * steps) * waves
    return 1e6 * moved / bandwidth * spilled * uneven + ends + SLOWEST_START / 2
