"""Sections for those who look closer: layers fused and why not, the proof, the machine."""

from __future__ import annotations

from typing import Any

from dsmoe_compiler.compare.result import Comparison
from dsmoe_compiler.report.markup import Markup, table, tag


def layers_section(comparison: Comparison) -> Markup | None:
    """One row per layer, or one for a run of layers that were fused alike."""
    layers = comparison.layers
    if not layers:
        return None
    fused = sum(bool(layer.get("fused")) for layer in layers)
    rows = [
        (
            _span([layer.get("name", "") for layer in group]),
            tag("span", "fused", class_="good-text")
            if group[0].get("fused")
            else tag("span", "left alone", class_="warn-text"),
            group[0].get("pattern") or "",
            group[0].get("operator") or "",
            group[0].get("kernel") or "",
            " at ".join(str(group[0][key]) for key in ("reason", "node") if group[0].get(key)),
        )
        for group in _alike(layers)
    ]
    return tag(
        "section",
        tag("h2", "Layers"),
        tag("p", f"{fused} of {len(layers)} mixture-of-experts layers are fused.", class_="lead"),
        table(("layer", "", "pattern", "operator", "kernel", "why not"), rows, text_columns=6),
    )


def verification_section(comparison: Comparison) -> Markup | None:
    """The checks that the artifact passed before it was published."""
    proof = comparison.verification
    if not proof:
        return None
    rows = [
        (
            tag("span", "passed", class_="good-text") if check.get("ok") else tag("span", "failed", class_="bad-text"),
            check.get("name", ""),
            check.get("detail", ""),
        )
        for check in proof.get("checks", ())
    ]
    first = proof.get("first_diverging_layer")
    note = "What was checked on this machine before the artifact was published."
    return tag(
        "section",
        tag("h2", "Verification"),
        tag("p", note if first is None else f"The first layer that diverges is {first}.", class_="lead"),
        table(("", "check", "found"), rows, text_columns=3),
    )


def environment_section(comparison: Comparison) -> Markup:
    """Machine, versions, command."""
    facts = [part for name, value in comparison.environment.items() for part in (tag("dt", name), tag("dd", value))]
    return tag("section", tag("h2", "Environment"), tag("dl", *facts))


def _alike(layers: tuple[dict[str, Any], ...]) -> list[list[dict[str, Any]]]:
    groups: list[list[dict[str, Any]]] = []
    for layer in layers:
        facts = {key: value for key, value in layer.items() if key != "name"}
        if groups and {key: value for key, value in groups[-1][0].items() if key != "name"} == facts:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
