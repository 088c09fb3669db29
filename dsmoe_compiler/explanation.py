"""What happened to every mixture-of-experts layer: what was matched and fused, or why it was left alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer. `operator` is what stands in the graph now; `reason` and `node` say where matching stopped."""

    name: str
    fused: bool
    pattern: str
    operator: str | None
    kernel: str
    reason: str | None = None
    node: str | None = None


@dataclass(frozen=True)
class PassReport:
    """One pass over one graph (a kind of block, or a whole program), with the graph as text where it was asked for."""

    graph: str
    name: str
    seconds: float
    rewritten: int
    refused: int
    removed: dict[str, int]
    graph_before: str | None = None
    graph_after: str | None = None


@dataclass(frozen=True)
class Explanation:
    """Every layer in the model's order, and every pass in the order in which it ran."""

    layers: tuple[LayerReport, ...]
    passes: tuple[PassReport, ...]
    capture_seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())

    @property
    def left_alone(self) -> tuple[LayerReport, ...]:
        """The layers that were not fused."""
        return tuple(layer for layer in self.layers if not layer.fused)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        fused = len(self.layers) - len(self.left_alone)
        lines = [f"{fused} of {len(self.layers)} mixture-of-experts layers fused"]
        for layer in self.layers:
            if layer.fused:
                lines.append(f"  {layer.name}: {layer.pattern} -> {layer.operator} ({layer.kernel})")
            else:
                where = f" at {layer.node}" if layer.node else ""
                lines.append(f"  {layer.name}: left alone{where}: {layer.reason}")
        return "\n".join([*lines, *self.notes])
