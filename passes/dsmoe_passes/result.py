"""What a pass says of itself: what it rewrote, what it left alone and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx


@dataclass(frozen=True)
class Rewritten:
    """One place that a pass rewrote."""

    layer: str
    pattern: str
    operator: str
    node: str


@dataclass(frozen=True)
class Refused:
    """One place that looked like the pattern and was left alone."""

    layer: str
    node: str
    because: str


@dataclass(frozen=True)
class PassResult:
    """The outcome of one pass over one graph."""

    name: str
    rewritten: tuple[Rewritten, ...] = ()
    refused: tuple[Refused, ...] = ()
    removed: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{len(self.rewritten)} rewritten"] if self.rewritten else []
        parts += [f"{len(self.refused)} refused"] if self.refused else []
        parts += [f"{count} x {what}" for what, count in self.removed.items()]
        return f"{self.name}: {', '.join(parts) or 'nothing to do'}"


class Mismatch(Exception):
    """Raised while a pattern is read: `node` is where reading stopped, the message is the reason that users see."""

    def __init__(self, node: fx.Node, because: str) -> None:
        super().__init__(because)
        self.node = node


def layer_of(node: fx.Node) -> str:
    """Dotted path of the innermost module that `node` was traced in, as far as tracing kept it."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
    return clean_path(path)


def clean_path(path: str) -> str:
    """`L['self']._modules['layers']._modules['1'].mlp` and `L__self___layers.1.mlp` -> `layers.1.mlp`."""
    for noise in ("L['self']", "L['fn']", "_modules", "L__self___"):
        path = path.replace(noise, "")
    path = path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")
    return ".".join(part for part in path.split(".") if part)
