"""Charts as inline SVG: bars, lines on logarithmic axes, dots on a strip. Colours come from the page's style sheet.

Each series carries the name of its candidate as a class (`c-eager`), so that light and dark pages colour it alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dsmoe_compiler.report.axes import LogScale
from dsmoe_compiler.report.markup import Markup, join, tag


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: `value` None draws `note` in its place."""

    label: str
    name: str
    value: float | None
    text: str = ""
    strong: str = ""
    note: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line through points (x, y), or the points alone; `whiskers` are (x, low, high)."""

    label: str
    name: str
    points: tuple[tuple[float, float], ...]
    whiskers: tuple[tuple[float, float, float], ...] = ()
    joined: bool = True


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A row of dots with a mark: what was measured, and what was allowed."""

    label: str
    name: str
    values: tuple[float, ...]
    mark: float | None
    note: str = ""


def bar_chart(bars: list[Bar], *, title: str, width: int = 520) -> Markup:
    """Horizontal bars from zero; the value after the bar, the speed-up in bold, p10 to p90 as a thin line."""
    left, right, pitch, thick = 184, 132, 34, 18
    height = pitch * len(bars) + 6
    top = max((bar.high or bar.value or 0.0 for bar in bars), default=0.0) or 1.0
    parts = []
    for row, bar in enumerate(bars):
        y = row * pitch + pitch / 2
        parts.append(_text(left - 12, y, bar.label, cls="label", anchor="end", name=bar.name))
        if bar.value is None:
            parts.append(_text(left, y, bar.note, cls="muted"))
            continue
        length = (width - left - right) * bar.value / top
        parts.append(
            tag(
                "rect", class_=f"fill c-{bar.name}", x=left, y=y - thick / 2, width=max(length, 1.5), height=thick, rx=2
            )
        )
        if bar.low is not None and bar.high is not None:
            scale = (width - left - right) / top
            parts.append(
                tag("path", class_="whisker", d=f"M{left + bar.low * scale:.1f} {y:.1f}H{left + bar.high * scale:.1f}")
            )
        reach = left + (width - left - right) * (bar.high or bar.value) / top
        value = tag("tspan", bar.text, class_="value")
        strong = tag("tspan", bar.strong, class_="strong", dx=8) if bar.strong else None
        parts.append(tag("text", value, strong, x=reach + 9, y=y, dominant_baseline="central"))
    parts.append(tag("path", class_="axis", d=f"M{left} 0V{height - 6}"))
    return _svg(width, height, title, parts)


def line_chart(
    series: list[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    x_ticks: list[float] | None = None,
    roof: tuple[tuple[float, float], ...] = (),
    remarks: tuple[tuple[float, str], ...] = (),
    width: int = 520,
    height: int = 320,
) -> Markup:
    """Lines on two logarithmic axes with their names at the right end; `roof` is a heavy line behind them.

    `remarks` are (x, text), each a guide across the chart with its text above.
    """
    left, right, top, bottom = 62, 150, 42 if remarks else 26, 44
    known = [point for one in series for point in one.points] + list(roof)
    ends = [(x, end) for one in series for x, low, high in one.whiskers for end in (low, high)]
    x_scale = LogScale.around((x for x, _ in known), left, width - right, room=1.12 if not roof else 1.0)
    y_scale = LogScale.around((y for _, y in known + ends), height - bottom, top)
    parts = _grid(x_scale, y_scale, x_ticks or x_scale.ticks(), x_text, y_text, x_label)
    parts.append(_text(0, 8, y_label, cls="axis-label"))
    for x, text in remarks:
        parts.append(tag("path", class_="guide", d=f"M{x_scale(x):.1f} {top:.1f}V{height - bottom:.1f}"))
        parts.append(_text(x_scale(x), top - 9, text, cls="remark", anchor="middle"))
    if roof:
        parts.append(tag("path", class_="roof", d=_path([(x_scale(x), y_scale(y)) for x, y in roof])))
    labels = []
    for one in series:
        places = [(x_scale(x), y_scale(y)) for x, y in one.points]
        for x, low, high in one.whiskers:
            parts.append(
                tag(
                    "path",
                    class_=f"stroke thin c-{one.name}",
                    d=f"M{x_scale(x):.1f} {y_scale(low):.1f}V{y_scale(high):.1f}",
                )
            )
        if one.joined:
            parts.append(tag("path", class_=f"stroke c-{one.name}", d=_path(places)))
        if one.joined is False or len(places) < 16:
            parts += [tag("circle", class_=f"fill dot c-{one.name}", cx=x, cy=y, r=4) for x, y in places]
        if places:
            labels.append((places[-1][1], one))
    for y, one in _apart(labels, gap=15, low=top, high=height - bottom):
        parts.append(_text(width - right + 12, y, one.label, cls="end", name=one.name))
    return _svg(width, height, title, parts)


def strip_chart(
    strips: list[Strip],
    *,
    title: str,
    x_label: str,
    mark_label: str,
    x_text: Callable[[float], str],
    width: int = 1040,
) -> Markup:
    """Dots on a logarithmic axis, one row per candidate, the mark as a bar across the row."""
    left, right, pitch, top, bottom = 190, 150, 40, 20, 44
    height = top + pitch * len(strips) + bottom + 4
    marks = [strip.mark for strip in strips if strip.mark is not None]
    scale = LogScale.around(
        [value for strip in strips for value in strip.values] + marks, left, width - right, room=1.6
    )
    parts = []
    for tick in scale.ticks():
        parts.append(tag("path", class_="grid", d=f"M{scale(tick):.1f} {top}V{height - bottom}"))
        parts.append(_text(scale(tick), height - bottom + 16, x_text(tick), cls="tick", anchor="middle"))
    for row, strip in enumerate(strips):
        y = top + row * pitch + pitch / 2
        parts.append(_text(left - 14, y, strip.label, cls="label", anchor="end", name=strip.name))
        for index, value in enumerate(strip.values):
            spread = (index * 0.618 % 1 - 0.5) * 16  # the same jitter every time
            if value > 0 and math.isfinite(value):
                parts.append(tag("circle", class_=f"fill faint c-{strip.name}", cx=scale(value), cy=y + spread, r=3.2))
        if strip.mark is not None and strip.mark > 0:
            if row == 0:
                parts.append(_text(scale(strip.mark), 8, mark_label, cls="remark", anchor="middle"))
            parts.append(tag("path", class_="mark", d=f"M{scale(strip.mark):.1f} {y - 14:.1f}V{y + 14:.1f}"))
        parts.append(_text(width - right + 14, y, strip.note, cls="note"))
    parts.append(_text((left + width - right) / 2, height - 6, x_label, cls="axis-label", anchor="middle"))
    return _svg(width, height, title, parts)


def _grid(
    x_scale: LogScale,
    y_scale: LogScale,
    x_ticks: list[float],
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    x_label: str,
) -> list[Markup]:
    left, right, bottom, top = x_scale.start, x_scale.end, y_scale.start, y_scale.end
    parts = []
    for tick in y_scale.ticks():
        parts.append(tag("path", class_="grid", d=f"M{left:.1f} {y_scale(tick):.1f}H{right:.1f}"))
        parts.append(_text(left - 8, y_scale(tick), y_text(tick), cls="tick", anchor="end"))
    for tick in x_ticks:
        parts.append(tag("path", class_="grid", d=f"M{x_scale(tick):.1f} {top:.1f}V{bottom:.1f}"))
        parts.append(_text(x_scale(tick), bottom + 15, x_text(tick), cls="tick", anchor="middle"))
    parts.append(_text((left + right) / 2, bottom + 36, x_label, cls="axis-label", anchor="middle"))
    return parts


def _apart(labels: list[tuple[float, Series]], *, gap: float, low: float, high: float) -> list[tuple[float, Series]]:
    """Push labels that would overlap apart, keeping their order."""
    placed: list[tuple[float, Series]] = []
    for y, one in sorted(labels, key=lambda label: label[0]):
        placed.append((max(y, placed[-1][0] + gap if placed else low), one))
    overflow = placed[-1][0] - high if placed else 0.0
    for index in range(len(placed) - 1, -1, -1):
        limit = high if index == len(placed) - 1 else placed[index + 1][0] - gap
        if overflow > 0:
            placed[index] = (min(placed[index][0], limit), placed[index][1])
    return placed


def _path(places: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _text(x: float, y: float, content: str, *, cls: str, anchor: str | None = None, name: str | None = None) -> Markup:
    classes = f"{cls} t-{name}" if name else cls
    return tag("text", content, x=x, y=y, class_=classes, text_anchor=anchor, dominant_baseline="central")


def _svg(width: int, height: float, title: str, parts: list[Markup]) -> Markup:
    return tag(
        "svg",
        tag("title", title),
        join(*parts),
        viewBox=f"0 0 {width} {height:.0f}",
        role="img",
        aria_label=title,
        class_="chart",
        style=f"max-width:{width}px",
    )
