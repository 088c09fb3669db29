"""What goes to the two streams: the result to stdout, log and progress to stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

PACKAGES = ("dsmoe_compiler", "dsmoe_passes", "dsmoe_runtime", "dsmoe_model")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class UsageError(ValueError):
    """What was asked for cannot be asked for: exit 2, before any work."""


def set_up_log(verbose: int, quiet: int) -> None:
    """Send the log of the four packages to stderr; DSMOE_LOG_LEVEL names the level, -v and -q move it.

    Raises:
        UsageError: DSMOE_LOG_LEVEL is no level of Python's logging.
    """
    name = os.environ.get("DSMOE_LOG_LEVEL", "INFO").upper()
    if name not in LEVELS:
        raise UsageError(f"DSMOE_LOG_LEVEL={name!r} is no log level; use one of {', '.join(LEVELS)}")
    level = min(max(getattr(logging, name) + 10 * (quiet - verbose), logging.DEBUG), logging.CRITICAL)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)-7s %(name)s: %(message)s" if verbose else "%(message)s"))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
    if not verbose:
        warnings.simplefilter("ignore", FutureWarning)  # what torch will change one day concerns its callers, not users
    warnings.showwarning = _log_warning


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as a line of the log: where in the code it was raised helps nobody who runs a command."""
    logging.getLogger(PACKAGES[0]).warning("warning: %s", message)


def accept_any_text() -> None:
    """Let stdout write what its encoding lacks (a path that is no UTF-8, say) as an escape, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """One line of the result."""
    print(text, flush=True)


def print_json(value: Any) -> None:
    """The result as JSON; inf and nan, which it has no spelling for, become null."""
    json.dump(finite(value), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    say("")


def finite(value: Any) -> Any:
    """`value` with None in place of every inf and nan."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns on stdout: text to the left, and what starts with a digit to the right, as figures stand."""
    table = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(columns))]
    figures = [all(row[column][:1].isdigit() for row in table[1:]) for column in range(len(columns))]
    for row in table:
        cells = zip(row, widths, figures, strict=True)
        say("  ".join(cell.rjust(width) if figure else cell.ljust(width) for cell, width, figure in cells).rstrip())
