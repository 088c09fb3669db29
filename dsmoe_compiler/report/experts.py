"""Section on the experts: who was chosen how often, layer by layer."""

from __future__ import annotations

from statistics import fmean

from dsmoe_compiler.compare.result import Comparison
from dsmoe_compiler.report.heatmap import heatmap, legend
from dsmoe_compiler.report.markup import Markup, tag


def section(comparison: Comparison) -> Markup | None:
    """The heatmap with entropy and Gini; nothing for a model without routed experts."""
    if not comparison.load:
        return None
    entropy = fmean(layer.entropy for layer in comparison.load)
    idle = sum(len(layer.counts) - layer.distinct for layer in comparison.load)
    slots = sum(len(layer.counts) for layer in comparison.load)
    note = (
        f"Mean entropy {entropy:.3f} of 1; {idle} of {slots} experts were never chosen. Counted on the eager reference "
        f"over {comparison.decode_context + comparison.decode_steps} tokens per sequence ({comparison.inputs}). "
        "Entropy is relative to an even load: 1 means that all experts are used alike, and there Gini is 0."
    )
    return tag(
        "section",
        tag("h2", "Expert load"),
        tag("p", note, class_="lead"),
        tag("figure", heatmap(comparison.load), class_="wide"),
        legend(),
    )
