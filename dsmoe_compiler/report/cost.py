"""Sections on what speed is up against: the roofline of this machine, and the time that compiling takes."""

from __future__ import annotations

from dsmoe_compiler.compare.figures import bytes_text, count_text, seconds_text
from dsmoe_compiler.compare.result import CandidateReport, Comparison, PhaseWork
from dsmoe_compiler.report.axes import si
from dsmoe_compiler.report.charts import Series, line_chart
from dsmoe_compiler.report.markup import Markup, table, tag


def roofline_section(comparison: Comparison) -> Markup:
    """Each phase at its arithmetic intensity, under the roof measured in the same run."""
    roof = comparison.roof
    intensities = [item.work.flops / item.work.bytes for item in comparison.work]
    ridge = roof.flops_per_second / roof.bytes_per_second
    low, high = min([*intensities, ridge]) / 1.6, max([*intensities, ridge]) * 2.2
    edges = [(low, low * roof.bytes_per_second), (ridge, roof.flops_per_second), (high, roof.flops_per_second)]
    series = [_under_roof(comparison, candidate) for candidate in comparison.candidates]
    chart = line_chart(
        [one for one in series if one.points],
        title="Roofline",
        x_label="operations per byte that has to move",
        y_label="FLOP/s",
        x_text=lambda value: f"{value:.3g}",
        y_text=lambda value: si(value),
        roof=tuple(edges),
        remarks=tuple(_gathered(comparison)),
        height=340,
    )
    head = ("phase", "bound by", "bytes", "operations", "least time", "experts hit")
    rows = [
        (
            _short(item),
            item.work.bound,
            bytes_text(item.work.bytes),
            si(item.work.flops, "FLOP"),
            seconds_text(item.work.seconds),
            _range(item.distinct),
        )
        for item in comparison.work
    ]
    note = (
        f"Measured in this run: {bytes_text(roof.bytes_per_second)}/s of memory bandwidth and "
        f"{si(roof.flops_per_second)}FLOP/s in {roof.dtype} matrix products. Bytes count the weights of the experts "
        "that this input really hit, once per layer. A model that fits into the processor's cache can exceed the roof."
    )
    return tag(
        "section",
        tag("h2", "Against the roofline"),
        tag("p", note, class_="lead"),
        tag("div", tag("figure", chart), tag("div", table(head, rows, text_columns=2)), class_="grid"),
    )


def _under_roof(comparison: Comparison, candidate: CandidateReport) -> Series:
    points = []
    for item in comparison.work:
        point = candidate.at(item.phase, item.tokens)
        if point is not None and point.samples is not None:
            points.append((item.work.flops / item.work.bytes, item.work.flops / point.samples.median))
    return Series(label=candidate.title, name=candidate.name, points=tuple(sorted(points)), joined=False)


def compile_section(comparison: Comparison) -> Markup | None:
    """Total time against tokens decoded: where a line crosses eager's, compiling has paid for itself."""
    compiling = [c for c in comparison.candidates if c.compile_seconds is not None and c.at("decode", 1) is not None]
    if not compiling:
        return None
    furthest = max([c.break_even_tokens or 0 for c in compiling] + [1000]) * 10
    series, remarks = [], []
    for candidate in comparison.candidates:
        point = candidate.at("decode", 1)
        if point is None or point.tokens_per_second is None:
            continue
        begin, step = candidate.compile_seconds or 0.0, 1 / point.tokens_per_second
        counts = [10 ** (exponent / 8) for exponent in range(8, 200) if 10 ** (exponent / 8) <= furthest]
        line = tuple((count, begin + count * step) for count in counts)
        series.append(Series(label=candidate.title, name=candidate.name, points=line))
        if candidate.break_even_tokens:
            tokens = candidate.break_even_tokens
            remarks.append((float(tokens), count_text(tokens)))
    chart = line_chart(
        series,
        title="Time to decode n tokens, compilation included",
        x_label="tokens decoded (dotted: break-even)",
        y_label="seconds, compilation included",
        x_text=count_text,
        y_text=lambda seconds: f"{seconds:g}",
        remarks=tuple(remarks),
    )
    rows = [
        (
            candidate.title,
            candidate.note or "",
            f"{candidate.compile_seconds:.1f} s",
            f"{candidate.break_even_tokens:,}" if candidate.break_even_tokens else "never",
        )
        for candidate in compiling
        if candidate.compile_seconds is not None
    ]
    return tag(
        "section",
        tag("h2", "What compiling costs"),
        tag("p", "Break-even: tokens to decode until compiling has paid for itself against eager.", class_="lead"),
        tag(
            "div",
            tag("figure", chart),
            tag("div", table(("candidate", "", "compile", "break-even tokens"), rows, text_columns=2)),
            class_="grid",
        ),
    )


def _gathered(comparison: Comparison) -> list[tuple[float, str]]:
    """Arithmetic intensity and name of each phase; those that would be written over each other share one remark."""
    places = sorted((item.work.flops / item.work.bytes, _short(item)) for item in comparison.work)
    gathered: list[tuple[float, str]] = []
    for x, text in places:
        if gathered and x / gathered[-1][0] < 1.5:
            gathered[-1] = (gathered[-1][0], f"{gathered[-1][1]}, {text}")
        else:
            gathered.append((x, text))
    return gathered


def _short(item: PhaseWork) -> str:
    return "decode" if item.phase == "decode" else f"prefill {item.tokens}"


def _range(distinct: tuple[int, ...]) -> str:
    if not distinct:
        return "none"
    low, high = min(distinct), max(distinct)
    return str(low) if low == high else f"{low} to {high}"
