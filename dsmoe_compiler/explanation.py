"""What happened to every mixture-of-experts layer: what was matched and fused, or why it was left alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer. `operator` is what stands in the graph now; `reason` and `node` say where matching stopped.

    `gate` and `experts` are the family of the gate and the spelling of the experts that were recognised, `weights`
    whether the operator reads the model's own tensors or packed copies. `advice` is what to do about `reason`.
    `flops` counts the layer's router, routed and shared experts at the traced sizes, and `fused_flops` what of it the
    operators do; None where sizes depend on data.
    """

    name: str
    fused: bool
    pattern: str
    operator: str | None
    kernel: str
    reason: str | None = None
    node: str | None = None
    gate: str | None = None
    experts: str | None = None
    weights: str | None = None
    advice: str | None = None
    flops: int | None = None
    fused_flops: int | None = None

    def __str__(self) -> str:
        where = f" at {self.node}" if self.node else ""
        if not self.fused:
            return f"{self.name}: left alone{where}: {self.reason}{f'. {self.advice}' if self.advice else ''}"
        weights = f", weights {self.weights}" if self.weights else ""
        but = f"; more is not fused{where}: {self.reason}" if self.reason else ""
        return f"{self.name}: {self.pattern} -> {self.operator} ({self.kernel}{weights}){but}"


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

    @property
    def fused_share(self) -> float | None:
        """The share of the FLOPs of routers and experts that fused operators do; None if it cannot be told."""
        counted = [layer for layer in self.layers if layer.flops is not None]
        total = sum(layer.flops or 0 for layer in counted)
        if not total or len(counted) < len(self.layers):
            return None
        return sum(layer.fused_flops or 0 for layer in counted) / total

    @property
    def summary(self) -> str:
        """One line: layers fused, layers seen, share of FLOPs."""
        fused, share = len(self.layers) - len(self.left_alone), self.fused_share
        flops = "" if share is None else f", {100 * share:.4g} % of the FLOPs of routers and experts"
        return f"{fused} of {len(self.layers)} mixture-of-experts layers fused{flops}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        fused = len(self.layers) - len(self.left_alone)
        return {"layers_seen": len(self.layers), "layers_fused": fused, "fused_share": self.fused_share} | asdict(self)

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"  {layer}" for layer in self.layers), *self.notes])
