"""The page: a comparison as one self-contained HTML file, readable offline, in light and dark, without any script.

All text passes through `markup.tag`, which escapes it, and the content security policy forbids scripts and requests on
top, so a model may be called anything.
"""

from __future__ import annotations

import os
import tempfile
from importlib.resources import files
from pathlib import Path

from dsmoe_compiler.compare.figures import count_text
from dsmoe_compiler.compare.result import Comparison
from dsmoe_compiler.report import cost, detail, experts, numbers, speed
from dsmoe_compiler.report.markup import Markup, emphasise_ratios, join, tag

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def write_report(path: str | Path, comparison: Comparison) -> Path:
    """Write the page to `path`, all of it or nothing; returns the path. The folder must exist."""
    path = Path(path)
    handle, draft = tempfile.mkstemp(prefix=f".{path.name[:32]}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(render(comparison))
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    return path


def render(comparison: Comparison) -> str:
    """The page as text."""
    style = files("dsmoe_compiler.report").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Markup('<meta name="color-scheme" content="light dark"><meta name="robots" content="noindex">'),
        tag("title", f"{comparison.model} - dsmoe compare"),
        Markup(f"<style>{style}</style>"),
    )
    body = tag(
        "body",
        tag(
            "main",
            _header(comparison),
            speed.section(comparison),
            numbers.section(comparison),
            cost.roofline_section(comparison),
            cost.compile_section(comparison),
            experts.section(comparison),
            detail.layers_section(comparison),
            detail.verification_section(comparison),
            detail.environment_section(comparison),
        ),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _header(comparison: Comparison) -> Markup:
    ours = comparison.candidate("dsmoe")
    facts = [
        f"{count_text(comparison.parameters)} parameters",
        comparison.dtype,
        comparison.target,
        comparison.environment.get("gpu") or comparison.environment.get("cpu", ""),
        f"{comparison.environment.get('threads', '?')} threads" if comparison.target == "cpu" else "",
        f"batch {comparison.batch_size}",
        comparison.inputs,
    ]
    return tag(
        "header",
        tag("p", "dsmoe compare", class_="kicker"),
        tag("h1", comparison.model),
        tag("p", join(*(tag("span", fact) for fact in facts if fact)), class_="facts"),
        tag("p", emphasise_ratios(comparison.headline()), class_="headline"),
        tag("p", join(*_badges(comparison)), class_="badges"),
        _tiles(comparison) if ours.state == "measured" else None,
    )


def _badges(comparison: Comparison) -> list[Markup]:
    ours, badges = comparison.candidate("dsmoe"), []
    if ours.agreement is not None and ours.agreement.ok:
        badges.append(tag("span", "Agrees with float64 within eager's own rounding", class_="badge good"))
    elif ours.state in ("disagrees", "failed"):
        badges.append(tag("span", f"dsmoe {ours.state}: {ours.reason}", class_="badge bad"))
    if ours.agreement is not None:
        same = ours.agreement.repeatable
        text = "Same bits on every run" if same else "Bits differ from run to run"
        badges.append(tag("span", text, class_=f"badge {'good' if same else 'warn'}"))
    if comparison.verification is not None:
        proved = bool(comparison.verification.get("ok"))
        text = "Artifact verified" if proved else "Artifact not verified"
        badges.append(tag("span", text, class_=f"badge {'good' if proved else 'bad'}"))
    if comparison.unstable:
        badges.append(tag("span", "Unstable: some samples spread by more than 20 %", class_="badge warn"))
    return badges


def _tiles(comparison: Comparison) -> Markup:
    tiles = speed.tiles(comparison)
    return tag(
        "div",
        join(
            *(
                tag(
                    "div",
                    tag("span", what, class_="what"),
                    tag("span", value, tag("small", unit), class_="figure"),
                    tag("span", note, class_="note"),
                    class_="tile",
                )
                for what, value, unit, note in tiles
            )
        ),
        class_="tiles",
    )
