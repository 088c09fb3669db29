"""Figures as people read them; JSON gets them unrounded."""

from __future__ import annotations


def byte_size(value: float) -> str:
    """Bytes in the unit that leaves one to four digits before the point: 32.75 GB is 30.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def trillions(flops: float) -> str:
    """FLOPs as the paper prints them, in units of 10^12: 74.4T."""
    return f"{flops / 1e12:.1f}T" if flops >= 5e10 else f"{flops / 1e9:.1f}G"


def billions(parameters: int) -> str:
    """A number of parameters as the paper prints it: 16.4B, and 8.5M below a tenth of a billion."""
    if parameters >= 10**8:
        return f"{parameters / 1e9:.1f}B"
    return f"{parameters / 1e6:.1f}M" if parameters >= 10**5 else str(parameters)


def plural(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
