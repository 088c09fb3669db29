"""Markdown tables, and the line under a table that says how its figures were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def conditions(facts: dict[str, Any]) -> str:
    """Under what conditions, in one line under the table."""
    left_out = ("command", "date")
    text = ", ".join(f"{name} {value}" for name, value in facts.items() if name not in left_out)
    return f"{escaped(text)}. `{str(facts.get('command', '')).replace('`', '')}`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; the first column stands to the left, the others to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(escaped(cell) for cell in line)} |" for line in lines)


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
