"""What the machine must be able to do to run compiled code; checked when loading, so that nothing dies of SIGILL."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")

# Exactly what `-march=x86-64-v3` lets a compiler use beyond the baseline, and what v4 adds; in the kernel's names.
# "pni" is SSE3, "abm" is LZCNT.
X86_64_V3 = frozenset("pni ssse3 sse4_1 sse4_2 popcnt movbe avx avx2 bmi1 bmi2 f16c fma abm xsave cx16 lahf_lm".split())  # noqa: SIM905
X86_64_V4 = X86_64_V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
WIDE = ("avx512", "avx_", "amx")  # Inductor adds these to the command line by name
OTHERS = ("aes", "vaes", "sha", "gfni", "pclmulqdq", "vpclmulqdq", "adx", "rdrand", "rdseed", "fsgsbase", "clflushopt",
          "clwb", "clzero", "sse4a", "fma4", "xop", "tbm", "movdir", "prfchw", "rdpid", "xsave", "pku")  # fmt: skip


def features() -> frozenset[str]:
    """The instruction sets of this CPU, as Linux names them; empty elsewhere."""
    if not CPUINFO.exists():
        return frozenset()
    for line in CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def architecture() -> str | None:
    """The `-march` level that this machine and torch use: packages run on others of that level. None: not known."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512") and features() >= X86_64_V4:
        return "x86-64-v4"
    if capability.startswith("AVX") and features() >= X86_64_V3:
        return "x86-64-v3"
    return None


def requirement(level: str | None) -> dict[str, Any]:
    """What code compiled here for `level` needs (None: for this very CPU), as the manifest has it."""
    here = features()
    wide = {f for f in here if f.startswith(WIDE)}
    needs = {
        "x86-64-v3": X86_64_V3,
        "x86-64-v4": X86_64_V4 | wide,
        None: {f for f in here if f in X86_64_V4 or f.startswith(WIDE + OTHERS)},
    }[level]
    return {"machine": platform.machine(), "level": level or "native", "features": sorted(needs)}


def missing(required: dict[str, Any]) -> str | None:
    """Why this machine cannot run code with that requirement, or None."""
    if required["machine"] != platform.machine():
        return f"it is compiled for {required['machine']}, this machine is {platform.machine()}"
    lacking = sorted(set(required["features"]) - features()) if CPUINFO.exists() else []
    if lacking:
        return f"it is compiled for {required['level']} and uses {', '.join(lacking)}, which this CPU lacks"
    return None
