"""Axes of a chart: where a value stands on a linear or logarithmic scale, and which values get a label."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


@dataclass(frozen=True)
class LogScale:
    """Maps `low`..`high` (positive) to the pixels `start`..`end`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, *, room: float = 1.25) -> LogScale:
        """A scale that holds all positive values with a factor of `room` to spare at both ends."""
        positive = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
        return cls(min(positive) / room, max(positive) * room, start, end)

    def __call__(self, value: float) -> float:
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return self.start + (self.end - self.start) * min(share, 1.0)

    def ticks(self) -> list[float]:
        """Powers of ten; with 2 and 5 between them where there would be fewer than three."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            found = [step * 10.0**decade for decade in decades for step in steps]
            found = [tick for tick in found if self.low <= tick <= self.high]
            if len(found) >= 3:
                break
        every = math.ceil(len(found) / 7)
        return found[::every]


def si(value: float, unit: str = "") -> str:
    """Two or three significant digits with a prefix: 1.5 k, 20 µs; nothing smaller than nano."""
    for scale, prefix in _PREFIXES:
        if value >= scale * 0.9995:
            return f"{value / scale:.3g} {prefix}{unit}".rstrip()
    return f"{value:.1g} {unit}".rstrip()


def power(value: float) -> str:
    """1e-7 as 10⁻⁷ where it is a power of ten, else 3e-7 as 3·10⁻⁷."""
    exponent = math.floor(math.log10(value) + 1e-9)
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    lead = round(value / 10.0**exponent)
    return f"10{digits}" if lead == 1 else f"{lead}·10{digits}"
