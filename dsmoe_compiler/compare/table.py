"""The comparison on a terminal: rich where there is one, aligned plain text elsewhere."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from dsmoe_compiler.compare.figures import bytes_text, rate_text, seconds_text
from dsmoe_compiler.compare.result import CandidateReport, Comparison, Measurement

_HEAD = ("candidate", "tokens/s", "mean ± sd", "median", "p90", "vs eager", "of roof", "memory")


def render_table(comparison: Comparison) -> str:
    """The whole comparison as text, coloured if stdout is a terminal; print it as it is."""
    lines = [comparison.headline(), ""]
    for work in comparison.work:
        title = (
            f"prefill of {work.tokens} tokens"
            if work.phase == "prefill"
            else f"decode, {comparison.decode_steps} steps after {comparison.decode_context} tokens"
        )
        bound = f"{work.work.bytes / 1e6:.1f} MB, {work.work.flops / 1e9:.3g} GFLOP at least, {work.work.bound} bound"
        rows = [_row(candidate, work.phase, work.tokens) for candidate in comparison.candidates]
        lines += [f"{title}  ({bound})", _table(_HEAD, rows), ""]
    rows = [_numbers(candidate) for candidate in comparison.candidates]
    lines += [
        "numbers, against float64",
        _table(
            ("candidate", "", "error (median)", "worst row", "budget", "routing", "greedy", "compile", "pays off"), rows
        ),
    ]
    lines += [f"{c.title}: {c.reason}" for c in comparison.candidates if c.reason]
    if comparison.unstable:
        lines.append("* unstable: p10 to p90 spread over more than 20 % of the median; repeat on a quieter machine")
    return "\n".join(lines)


def _row(candidate: CandidateReport, phase: str, tokens: int) -> tuple[str, ...]:
    found: Measurement | None = next(
        (m for m in candidate.measurements if m.phase == phase and m.tokens == tokens), None
    )
    if found is None or found.samples is None or found.tokens_per_second is None:
        return (candidate.title, candidate.state if found is None else "skipped", *[""] * (len(_HEAD) - 2))
    samples = found.samples
    return (
        candidate.title,
        rate_text(found.tokens_per_second) + ("*" if samples.unstable else ""),
        f"{seconds_text(samples.mean)} ± {seconds_text(samples.sd)}",
        seconds_text(samples.median),
        seconds_text(samples.p90),
        f"{found.speedup:.2f}x" if found.speedup else "",
        f"{found.roofline_share:.0%}" if found.roofline_share else "",
        bytes_text(found.memory.working_bytes) if found.memory else "",
    )


def _numbers(candidate: CandidateReport) -> tuple[str, ...]:
    found = candidate.agreement
    compile_text = seconds_text(candidate.compile_seconds) if candidate.compile_seconds is not None else ""
    pays_off = f"{candidate.break_even_tokens:,} tokens" if candidate.break_even_tokens is not None else ""
    if compile_text and not pays_off:
        pays_off = "never"
    if found is None:
        return (candidate.title, candidate.state, *[""] * 5, compile_text, pays_off)
    errors = sorted(found.errors)
    flips, routed = sum(v.mismatches for v in found.routing), sum(v.tokens for v in found.routing)
    return (
        candidate.title,
        "agrees" if found.ok else "DISAGREES",
        f"{errors[len(errors) // 2]:.1e}" if errors else "",
        f"{found.values.worst:.1e}",
        f"{found.values.budget:.1e}",
        f"{flips} of {routed} differ" if found.routing_reported else "not reported",
        f"{found.greedy_equal} of {len(errors)}",
        compile_text,
        pays_off,
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if sys.stdout.isatty():
        table = Table(box=None, header_style="bold", pad_edge=False)
        for index, name in enumerate(head):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row, style="green" if row[0] == "dsmoe" else None)
        console = Console(file=sys.stdout, markup=False, highlight=False)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip("\n")
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    lines = []
    for line in (head, *rows):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
