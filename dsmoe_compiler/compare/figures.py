"""Figures as people read them, the same in the table and in the report."""

from __future__ import annotations


def seconds_text(seconds: float) -> str:
    """12.3 s, 4.56 ms, 789 us."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def bytes_text(count: float) -> str:
    """12.3 MB, 4.6 GB; decimal units, as bandwidth is given in."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def rate_text(rate: float) -> str:
    """Tokens per second: three significant digits, or all before the point."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def count_text(count: float) -> str:
    """16.4 B, 32.1 M: parameters and tokens."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f}"
