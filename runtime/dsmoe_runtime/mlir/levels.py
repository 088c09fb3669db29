"""The feature levels of x86 that kernels are generated for, and which of them this machine can run."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from dsmoe_runtime.errors import TargetError


@dataclass(frozen=True)
class Level:
    """One named set of instructions; a kernel of a level holds no instruction beyond it."""

    name: str
    lanes: int  # float32 values of a vector register
    tile_rows: int  # rows of weights in a register tile of two vectors of tokens
    cpu: str  # LLVM's name
    features: str  # LLVM's features beyond those of `cpu`; with none named, LLVM takes all of the machine that compiles
    dot: bool  # vdpbf16ps: products of bfloat16 in pairs, summed in float32
    flags: frozenset[str] = field(repr=False)  # what /proc/cpuinfo must list; a set has no order to be named by


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

LEVELS = {
    level.name: level
    for level in (
        Level("avx2", 8, 6, "x86-64-v3", "+avx2", False, _AVX2),
        # x86-64-v4 alone is tuned for 256-bit registers, as the first processors that had AVX512 were.
        Level("avx512", 16, 12, "x86-64-v4", "+avx512f,-prefer-256-bit", False, _AVX512),
        Level(
            "avx512_bf16", 16, 12, "x86-64-v4", "+avx512f,+avx512bf16,-prefer-256-bit", True, _AVX512 | {"avx512_bf16"}
        ),
    )
}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets that Linux says this processor has; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def best_level(flags: frozenset[str] | None = None) -> Level:
    """The highest level whose every flag is there; a machine below AVX2 is refused by name.

    Products in pairs round the hidden state of an expert to bfloat16: whoever wants them names their level.
    """
    flags = cpu_flags() if flags is None else flags
    fitting = [level for level in LEVELS.values() if level.flags <= flags and not level.dot]
    if not fitting:
        missing = ", ".join(sorted(_AVX2 - flags))
        raise TargetError(f"the mlir-cpu kernels need x86-64 with AVX2 and FMA; this processor lacks {missing}")
    return fitting[-1]


def lacking(level: Level) -> list[str]:
    """What this processor has not of a level."""
    return sorted(level.flags - cpu_flags())


def check_runs(level: Level) -> None:
    """Raises: TargetError, if this processor cannot run the level."""
    if missing := lacking(level):
        raise TargetError(f"level {level.name} needs {', '.join(missing)}, which this processor lacks")


def level_named(name: str) -> Level:
    """The level of that name, whether or not this machine can run it."""
    if name not in LEVELS:
        raise TargetError(f"feature level is {name!r}; it must be one of {', '.join(LEVELS)}")
    return LEVELS[name]
