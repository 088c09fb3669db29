"""Expert load as a picture: one row per layer, one cell per expert, colour for how far it is from an even load."""

from __future__ import annotations

import math

from dsmoe_compiler.compare.load import LayerLoad
from dsmoe_compiler.report.markup import Markup, join, tag

_LEVELS = (
    (0.25, "under 1/4"),
    (0.5, "1/4 - 1/2"),
    (0.8, "1/2 - 0.8"),
    (1.25, "even"),
    (2.0, "1.25 - 2"),
    (4.0, "2 - 4"),
)
LEGEND = ("never", *(text for _, text in _LEVELS), "over 4")


def level(count: int, even: float) -> int:
    """0 for an expert never chosen, else 1 (under a quarter of `even`) to 7 (over four times); `even` itself is 4."""
    if count == 0:
        return 0
    ratio = count / even
    return next((index + 1 for index, (limit, _) in enumerate(_LEVELS) if ratio < limit), len(_LEVELS) + 1)


def heatmap(layers: tuple[LayerLoad, ...], *, width: int = 1040) -> Markup:
    """Cells of one colour are one path, so that 60 layers x 256 experts stay small; the numbers are beside the rows."""
    left, right, top = 130, 230, 24
    n_experts = max(len(layer.counts) for layer in layers)
    cell = (width - left - right) / n_experts
    tall = max(9.0, min(20.0, cell))
    gap = 1.0 if cell > 5 else 0.0
    parts, columns = [], ((60, "entropy"), (118, "Gini"), (176, "used"), (226, "hottest"))
    parts += [_text(width - right + x, 8, name, "tick", "end") for x, name in columns]
    parts += [
        _text(left + (expert + 0.5) * cell, 8, str(expert), "tick", "middle")
        for expert in range(0, n_experts, max(1, 2 ** math.ceil(math.log2(max(n_experts / 16, 1)))))
    ]
    paths: dict[int, list[str]] = {}
    for row, layer in enumerate(layers):
        y = top + row * (tall + 2)
        even = sum(layer.counts) / len(layer.counts)
        for expert, count in enumerate(layer.counts):
            box = f"M{left + expert * cell:.1f} {y:.1f}h{cell - gap:.1f}v{tall:.1f}h-{cell - gap:.1f}z"
            paths.setdefault(level(count, even), []).append(box)
        values = (
            f"{layer.entropy:.3f}",
            f"{layer.gini:.2f}",
            f"{layer.distinct}/{len(layer.counts)}",
            f"{layer.hottest_share:.1%}",
        )
        parts.append(_text(left - 12, y + tall / 2, layer.name, "label", "end"))
        parts += [
            _text(width - right + x, y + tall / 2, value, "value", "end")
            for (x, _), value in zip(columns, values, strict=True)
        ]
    parts += [tag("path", class_=f"heat-{index}", d="".join(boxes)) for index, boxes in sorted(paths.items())]
    height = top + len(layers) * (tall + 2)
    title = f"Expert load of {len(layers)} layers x {n_experts} experts"
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


def legend() -> Markup:
    """What the colours mean, as multiples of an even load."""
    keys = [
        tag(
            "span",
            tag("svg", tag("rect", class_=f"heat-{i}", width=14, height=14), width=14, height=14),
            text,
            class_="key",
        )
        for i, text in enumerate(LEGEND)
    ]
    return tag("p", tag("span", "Load, as a multiple of an even one:", class_="key"), join(*keys), class_="legend")


def _text(x: float, y: float, content: str, cls: str, anchor: str) -> Markup:
    return tag("text", content, x=x, y=y, class_=cls, text_anchor=anchor, dominant_baseline="central")
