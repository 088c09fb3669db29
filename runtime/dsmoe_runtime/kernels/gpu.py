"""What a GPU can do, as the cost model needs it: from its name where we know it, else derived from its properties."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

KIB, MIB = 1024, 1024**2


@dataclass(frozen=True)
class Device:
    """Facts of one GPU. Rates are what kernels reach, not what is printed: some 0.94 of the one, 0.8 of the other.

    shared_memory: bytes that one program may have, and that a multiprocessor has; registers: 32-bit ones of a
    multiprocessor. bandwidth: bytes/s read. matrix_rate: FLOP/s of 16-bit products with float32 sums; float_rate: of
    float32 without tensor cores.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    shared_memory_each: int
    registers: int
    l2_bytes: int
    bandwidth: float
    matrix_rate: float
    float_rate: float

    @property
    def wgmma(self) -> bool:
        """Hopper: products of warpgroups, tensors copied by TMA, launches chained."""
        return self.capability[0] == 9

    @property
    def tma(self) -> bool:
        return self.capability >= (9, 0)


@dataclass(frozen=True)
class Generation:
    """What GPUs of a compute capability share: bytes of shared memory, 16-bit and float32 FMA a clock."""

    shared_memory: int
    shared_memory_each: int
    matrix_fma: int
    float_fma: int
    bandwidth: float  # bytes/s, for a GPU that does not tell


GENERATIONS = {
    (8, 0): Generation(163 * KIB, 164 * KIB, 1024, 64, 1.9e12),
    (8, 6): Generation(99 * KIB, 100 * KIB, 256, 128, 0.7e12),
    (8, 9): Generation(99 * KIB, 100 * KIB, 512, 128, 0.7e12),
    (9, 0): Generation(227 * KIB, 228 * KIB, 2048, 128, 3.0e12),
    (10, 0): Generation(227 * KIB, 228 * KIB, 4096, 128, 7.0e12),
    (12, 0): Generation(99 * KIB, 100 * KIB, 512, 128, 1.2e12),
}
READ, MULTIPLY = 0.945, 0.80  # of the printed rates: read from memory and 16-bit products on an H200, measured
CLOCK = 1.6e9

# name: capability, multiprocessors, L2 in MiB, printed bytes/s and dense 16-bit FLOP/s. Longer names come first.
KNOWN: dict[str, tuple[tuple[int, int], int, int, float, float]] = {
    "B200": ((10, 0), 148, 126, 8.0e12, 2250e12),
    "GH200 480GB": ((9, 0), 132, 60, 4.0e12, 989e12),
    "H200": ((9, 0), 132, 60, 4.8e12, 989e12),
    "H100 PCIe": ((9, 0), 114, 50, 2.0e12, 756e12),
    "H100 NVL": ((9, 0), 132, 60, 3.9e12, 835e12),
    "H100": ((9, 0), 132, 50, 3.35e12, 989e12),
    "A100-SXM4-80GB": ((8, 0), 108, 40, 2.04e12, 312e12),
    "A100 80GB PCIe": ((8, 0), 108, 40, 1.94e12, 312e12),
    "A100": ((8, 0), 108, 40, 1.56e12, 312e12),
    "A10G": ((8, 6), 80, 6, 0.6e12, 70e12),
    "A10": ((8, 6), 72, 6, 0.6e12, 125e12),
    "L40S": ((8, 9), 142, 96, 0.864e12, 362e12),
    "L4": ((8, 9), 58, 48, 0.3e12, 121e12),
    "RTX 4090": ((8, 9), 128, 72, 1.008e12, 165e12),
    "RTX 3090": ((8, 6), 82, 6, 0.936e12, 71e12),
}


def named(name: str) -> Device:
    """The facts of a GPU that is not here, by its name or a part of it. Raises: ValueError naming those we know."""
    wanted = name.removeprefix("NVIDIA ").strip()
    found = next((known for known in KNOWN if known.lower() == wanted.lower()), None)
    if found is None:
        raise ValueError(f"no facts about a GPU called {name!r}; there are some about {', '.join(KNOWN)}")
    capability, multiprocessors, l2, bandwidth, rate = KNOWN[found]
    made = GENERATIONS[capability]
    return Device(
        name=f"NVIDIA {found}",
        capability=capability,
        multiprocessors=multiprocessors,
        shared_memory=made.shared_memory,
        shared_memory_each=made.shared_memory_each,
        registers=65536,
        l2_bytes=l2 * MIB,
        bandwidth=READ * bandwidth,
        matrix_rate=MULTIPLY * rate,
        float_rate=MULTIPLY * 2 * made.float_fma * multiprocessors * CLOCK,
    )


@cache
def facts(device: torch.device) -> Device:
    """The facts of a GPU that is here. Where there is none, and a graph is made for one elsewhere: those of an H200."""
    if not torch.cuda.is_available():
        return named("H200")
    return from_properties(torch.cuda.get_device_properties(device))


def from_properties(properties: Any) -> Device:
    """From `torch.cuda.get_device_properties`; a part of a GPU (MIG) has its share of the rates."""
    capability, count = (properties.major, properties.minor), properties.multi_processor_count
    made = GENERATIONS.get(capability) or GENERATIONS[max((k for k in GENERATIONS if k <= capability), default=(8, 0))]
    known = next((k for k in KNOWN if k in properties.name and KNOWN[k][0] == capability), None)
    clock = 1e3 * (getattr(properties, "clock_rate", 0) or 0) or CLOCK
    if known is not None:
        whole = named(known)
        share = min(1.0, count / whole.multiprocessors)
        bandwidth, rate = share * whole.bandwidth, share * whole.matrix_rate
    else:
        bits = getattr(properties, "memory_bus_width", 0) or 0
        bandwidth = READ * (2e3 * (getattr(properties, "memory_clock_rate", 0) or 0) * bits / 8 or made.bandwidth)
        rate = MULTIPLY * 2 * made.matrix_fma * count * clock
    return Device(
        name=properties.name,
        capability=capability,
        multiprocessors=count,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", 0) or made.shared_memory,
        shared_memory_each=getattr(properties, "shared_memory_per_multiprocessor", 0) or made.shared_memory_each,
        registers=getattr(properties, "regs_per_multiprocessor", 0) or 65536,
        l2_bytes=getattr(properties, "L2_cache_size", 0) or 40 * MIB,
        bandwidth=bandwidth,
        matrix_rate=rate,
        float_rate=MULTIPLY * 2 * made.float_fma * count * clock,
    )
