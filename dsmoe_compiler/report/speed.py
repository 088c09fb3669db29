"""Section on speed: tokens per second, latency against length, every timing and sample."""

from __future__ import annotations

from dsmoe_compiler.compare.figures import bytes_text, count_text, rate_text, seconds_text
from dsmoe_compiler.compare.result import Comparison
from dsmoe_compiler.compare.timing import quantile
from dsmoe_compiler.report.axes import si
from dsmoe_compiler.report.charts import Bar, Series, bar_chart, line_chart
from dsmoe_compiler.report.markup import Markup, join, table, tag


def phase_title(comparison: Comparison, phase: str, tokens: int) -> str:
    """What was timed, in words."""
    if phase == "decode":
        return f"Decode: one token at a time after {comparison.decode_context}"
    return f"Prefill: {tokens} token{'s' if tokens > 1 else ''} at once"


def tiles(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """(what, figure, unit, note) of our own results, for the top of the page."""
    ours, found = comparison.candidate("dsmoe"), []
    points = [("decode", 1), *([("prefill", max(comparison.tokens))] if comparison.tokens else [])]
    for phase, tokens in points:
        point = ours.at(phase, tokens)
        if point is not None and point.tokens_per_second is not None and point.roofline_share is not None:
            what = "Decode" if phase == "decode" else f"Prefill, {tokens} tokens"
            note = f"{point.speedup:.2f}× eager, {point.roofline_share:.0%} of the roofline" if point.speedup else ""
            found.append((what, rate_text(point.tokens_per_second), " tokens/s", note))
    if ours.compile_seconds is not None:
        pays = (
            f"pays off after {count_text(ours.break_even_tokens)} tokens"
            if ours.break_even_tokens
            else "never pays off"
        )
        found.append(("Compile", f"{ours.compile_seconds:.1f}", " s", pays))
    if ours.agreement is not None and ours.agreement.errors:
        flips = sum(layer.mismatches for layer in ours.agreement.routing)
        worst = max(ours.agreement.errors)
        found.append(
            ("Error against float64", f"{worst:.1e}", "", f"worst row; {flips} routing choices differ from eager")
        )
    return found


def section(comparison: Comparison) -> Markup:
    """Bars for every phase, latency against length, and the numbers."""
    decode = tag("figure", tag("figcaption", phase_title(comparison, "decode", 1)), _bars(comparison, "decode", 1))
    prefills = [
        tag(
            "figure",
            tag("figcaption", phase_title(comparison, "prefill", tokens)),
            _bars(comparison, "prefill", tokens),
        )
        for tokens in sorted(comparison.tokens, reverse=True)
    ]
    curve = _latency(comparison) if len(comparison.tokens) > 1 else None
    note = (
        f"Medians of {comparison.repeats} rounds in which the candidates took turns; the thin line is p10 to p90, "
        "the bold figure the speed-up over eager. Every candidate was checked against float64 before it was timed."
    )
    return tag(
        "section",
        tag("h2", "Speed"),
        tag("p", note, class_="lead"),
        tag("div", decode, prefills[0], curve, tag("div", *prefills[1:], class_="stack"), class_="grid"),
        tag("details", tag("summary", "All timings"), *_tables(comparison)),
        _samples(comparison),
    )


def _bars(comparison: Comparison, phase: str, tokens: int) -> Markup:
    bars = []
    for candidate in comparison.candidates:
        point = candidate.at(phase, tokens)
        if point is None or point.samples is None or point.tokens_per_second is None:
            skipped = next((m.skipped for m in candidate.measurements if (m.phase, m.tokens) == (phase, tokens)), None)
            note = "skipped: not enough memory" if skipped else candidate.state
            bars.append(Bar(label=candidate.title, name=candidate.name, value=None, note=note))
            continue
        work = point.tokens_per_second * point.samples.median
        seconds = list(point.samples.seconds)
        bars.append(
            Bar(
                label=candidate.title,
                name=candidate.name,
                value=point.tokens_per_second,
                text=rate_text(point.tokens_per_second),
                strong=f"{point.speedup:.2f}×" if point.speedup and candidate.name != "eager" else "",
                low=work / quantile(seconds, 0.9),
                high=work / quantile(seconds, 0.1),
            )
        )
    return bar_chart(bars, title=f"{phase_title(comparison, phase, tokens)}, tokens per second")


def _latency(comparison: Comparison) -> Markup:
    series = []
    for candidate in comparison.candidates:
        points = [candidate.at("prefill", tokens) for tokens in sorted(comparison.tokens)]
        known = [(p.tokens, p.samples) for p in points if p is not None and p.samples is not None]
        whiskers = [(t, quantile(list(s.seconds), 0.1), s.p90) for t, s in known]
        line = Series(
            label=candidate.title,
            name=candidate.name,
            points=tuple((float(tokens), samples.median) for tokens, samples in known),
            whiskers=tuple((float(tokens), low, high) for tokens, low, high in whiskers),
        )
        series.append(line)
    chart = line_chart(
        series,
        title="Latency of one prefill against its length",
        x_label="tokens",
        y_label="seconds",
        x_text=lambda tokens: f"{tokens:.0f}",
        y_text=lambda seconds: si(seconds, "s"),
        x_ticks=[float(tokens) for tokens in comparison.tokens],
    )
    return tag("figure", tag("figcaption", "Latency of one prefill against its length"), chart)


def _tables(comparison: Comparison) -> list[Markup]:
    head = ("candidate", "tokens/s", "mean", "± sd", "median", "p90", "spread", "vs eager", "of roof", "working memory")
    parts = []
    for work in comparison.work:
        rows: list[tuple[object, ...]] = []
        for candidate in comparison.candidates:
            point = candidate.at(work.phase, work.tokens)
            if point is None or point.samples is None or point.tokens_per_second is None:
                rows.append(
                    (candidate.title, candidate.state if candidate.state != "measured" else "skipped", *[""] * 8)
                )
                continue
            samples = point.samples
            unstable = tag("span", " unstable", class_="warn-text") if samples.unstable else None
            rows.append(
                (
                    candidate.title,
                    rate_text(point.tokens_per_second),
                    seconds_text(samples.mean),
                    seconds_text(samples.sd),
                    seconds_text(samples.median),
                    seconds_text(samples.p90),
                    join(f"{samples.spread:.0%}", unstable),
                    f"{point.speedup:.2f}×" if point.speedup else "",
                    f"{point.roofline_share:.1%}" if point.roofline_share else "",
                    bytes_text(point.memory.working_bytes) if point.memory else "not known",
                )
            )
        parts.append(tag("h3", phase_title(comparison, work.phase, work.tokens)))
        parts.append(table(head, rows, marked=_ours(comparison)))
    return parts


def _samples(comparison: Comparison) -> Markup:
    """Every sample in the order it was taken, in milliseconds."""
    rows = [
        (
            candidate.title,
            "decode" if point.phase == "decode" else f"prefill {point.tokens}",
            "  ".join(f"{seconds * 1000:.3f}" for seconds in point.samples.seconds),
        )
        for candidate in comparison.candidates
        for point in candidate.measurements
        if point.samples is not None
    ]
    head = ("candidate", "phase", "milliseconds")
    return tag("details", tag("summary", "Raw samples"), table(head, rows, text_columns=3))


def _ours(comparison: Comparison) -> int:
    return next((i for i, candidate in enumerate(comparison.candidates) if candidate.name == "dsmoe"), -1)
