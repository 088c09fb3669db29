"""Section on numbers: how far each candidate is from float64, and whether it chose the same experts."""

from __future__ import annotations

from statistics import median

from dsmoe_compiler.compare.result import CandidateReport, Comparison
from dsmoe_compiler.report.axes import power
from dsmoe_compiler.report.charts import Strip, strip_chart
from dsmoe_compiler.report.markup import Markup, table, tag


def section(comparison: Comparison) -> Markup:
    """Errors of every row of logits with the budget, then the verdicts."""
    strips = [
        Strip(
            label=candidate.title,
            name=candidate.name,
            values=candidate.agreement.errors,
            mark=candidate.agreement.values.budget,
            note="agrees" if candidate.agreement.ok else "disagrees",
        )
        for candidate in comparison.candidates
        if candidate.agreement is not None
    ]
    note = (
        "Each dot is one row of logits: its relative distance from float64 at the experts that the candidate itself "
        "chose. The bar is the budget, twice what rounding does to eager in the same dtype at those experts. Routing "
        "is judged apart: an expert may differ only where the float64 scores of the two are within rounding."
    )
    absent = [candidate for candidate in comparison.candidates if candidate.reason]
    chart = strip_chart(
        strips,
        title="Relative error against float64",
        x_label="relative error of a row of logits",
        mark_label="budget",
        x_text=power,
    )
    head = (
        "candidate",
        "verdict",
        "median",
        "worst row",
        "its budget",
        "routing differs",
        "greedy token",
        "repeats",
        "alone or together",
    )
    ours = next((i for i, candidate in enumerate(comparison.candidates) if candidate.name == "dsmoe"), -1)
    return tag(
        "section",
        tag("h2", "Numbers"),
        tag("p", note, class_="lead"),
        tag("figure", chart, class_="wide") if strips else None,
        table(head, [_row(candidate) for candidate in comparison.candidates], text_columns=2, marked=ours),
        tag("ul", *(tag("li", tag("b", c.title), f" - {c.state}: {c.reason}") for c in absent), class_="reasons")
        if absent
        else None,
        tag(
            "p",
            "Alone or together: the same tokens decoded one by one and in one prefill, as routing choices that differ "
            "and as relative distance of the last logits. Kernels sum in another order for another batch; nobody here "
            "is claimed to be batch-invariant.",
            class_="small",
        ),
    )


def _row(candidate: CandidateReport) -> tuple[object, ...]:
    found = candidate.agreement
    if found is None:
        return (candidate.title, tag("span", candidate.state, class_="muted-text"), *[""] * 7)
    flips, choices = sum(v.mismatches for v in found.routing), sum(v.tokens for v in found.routing)
    verdict = tag("span", "agrees", class_="good-text") if found.ok else tag("span", "disagrees", class_="bad-text")
    effect = found.batch_effect
    return (
        candidate.title,
        verdict,
        f"{median(found.errors):.1e}" if found.errors else "",
        f"{found.values.worst:.1e}",
        f"{found.values.budget:.1e}",
        f"{flips} of {choices:,}" if found.routing_reported else "not reported",
        f"{found.greedy_equal} of {len(found.errors)}",
        "to the bit" if found.repeatable else "not to the bit",
        f"{effect.flips} of {effect.tokens}, {effect.error:.0e}" if effect else "",
    )
