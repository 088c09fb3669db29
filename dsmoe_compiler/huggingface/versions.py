"""Which releases of transformers our code that looks inside it was written for, and the refusal of all others."""

from __future__ import annotations

from dsmoe_runtime.errors import ConfigError

OLDEST, NEWEST = "5.17", "5.24"  # from OLDEST on, below NEWEST; pyproject.toml says the same


def installed() -> str | None:
    """The version of transformers, or None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def why_not() -> str | None:
    """Why the installed transformers cannot be used, with both versions and the way out; None if it can."""
    found = installed()
    wanted = f"transformers>={OLDEST},<{NEWEST}"
    if found is None:
        return f"transformers is not installed: pip install '{wanted}'"
    if not _numbers(OLDEST) <= _numbers(found) < _numbers(NEWEST):
        return f"transformers is {found}; this version of dsmoe-compiler knows {wanted}: pip install '{wanted}'"
    return None


def check(what: str) -> None:
    """Raises: ConfigError, if transformers is missing or outside the range; `what` says who needs it."""
    reason = why_not()
    if reason is not None:
        raise ConfigError(f"{what}: {reason}")


def _numbers(version: str) -> tuple[int, ...]:
    """`5.23.0rc1` -> (5, 23)."""
    return tuple(int(part) for part in version.split(".")[:2])
