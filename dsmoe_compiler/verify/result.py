"""What a verification found: one check per line, numbers for the report, and the layer that diverges first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsmoe_runtime.errors import VerificationError


@dataclass(frozen=True)
class Check:
    """One question and its answer. `detail` is a line for people, `numbers` are plain values for JSON."""

    name: str
    ok: bool
    detail: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    layer: int | None = None  # on failure: the index of the first layer that this check accuses

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "numbers": dict(self.numbers)}


@dataclass(frozen=True)
class Verification:
    """The proof that goes into an artifact's manifest, or the reason why there is no artifact."""

    checks: tuple[Check, ...]
    first_diverging_layer: str | None
    dtype: str
    device: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def require(self) -> Verification:
        """Itself. Raises: VerificationError, unless every check passed; its `result` is this."""
        if not self.ok:
            error = VerificationError(f"the compiled model is not the same model; nothing was written\n{self}")
            error.result = self  # type: ignore[attr-defined]
            raise error
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "ok": self.ok,
            "dtype": self.dtype,
            "device": self.device,
            "seconds": round(self.seconds, 3),
            "first_diverging_layer": self.first_diverging_layer,
            "checks": [check.to_dict() for check in self.checks],
        }

    def __str__(self) -> str:
        """One line per check, then the verdict."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {check.detail}" for check in self.checks]
        failed = sum(not check.ok for check in self.checks)
        verdict = "the same model" if self.ok else f"not the same model: {failed} of {len(self.checks)} checks failed"
        if self.first_diverging_layer is not None:
            verdict += f"; the first layer that diverges is {self.first_diverging_layer}"
        return "\n".join([*lines, f"{verdict} ({self.dtype} on {self.device}, {self.seconds:.1f} s)"])
