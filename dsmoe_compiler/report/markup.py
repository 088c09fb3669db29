"""HTML and SVG by construction: every string is escaped unless it was made here, so no name can become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence


class Markup(str):
    """Text that is already HTML or SVG. Only `tag` and `join` make it."""

    __slots__ = ()


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """`<name attributes>children</name>`. Children that are not Markup are escaped, attribute values always.

    `class_` stands for class, an underscore for a hyphen (`text_anchor`); an attribute that is None is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*parts: object, by: str = "") -> Markup:
    """The parts one after another, escaped as in `tag`; None is left out."""
    texts = (part if isinstance(part, Markup) else html.escape(_text(part)) for part in parts if part is not None)
    return Markup(html.escape(by).join(texts))


def _text(value: object) -> str:
    """Numbers in SVG need no more than two places."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def emphasise_ratios(text: str) -> Markup:
    """`text` escaped, with every ratio such as 3.1x in bold and with a proper multiplication sign."""
    parts = re.split(r"(?<![\w.])(\d+(?:\.\d+)?)x(?= )", text)
    return join(*(tag("b", f"{part}×") if index % 2 else part for index, part in enumerate(parts)))


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, text_columns: int = 1, marked: int = -1) -> Markup:
    """A table; the first `text_columns` stand to the left and the others, numbers, to the right; `marked` is bold."""

    def cells(kind: str, row: Sequence[object]) -> Markup:
        return join(*(tag(kind, c, class_="num" if i >= text_columns else None) for i, c in enumerate(row)))

    body = join(*(tag("tr", cells("td", r), class_="ours" if i == marked else None) for i, r in enumerate(rows)))
    return tag("div", tag("table", tag("thead", tag("tr", cells("th", head))), tag("tbody", body)), class_="scroll")
