"""Which activation is it? The region between two GEMMs is run on random numbers and compared with a short catalogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import fx
from torch.nn import functional as F

from dsmoe_passes.region import literals, run
from dsmoe_passes.result import Mismatch

PROBE_ROWS = 64
SPREAD = 12.0  # wide enough that a clamp at 7 or 10 shows


@dataclass(frozen=True)
class Activation:
    """An activation as the `dsmoe` operators name it. `alpha` and `limit` are 0 where it has none."""

    name: str
    alpha: float = 0.0
    limit: float = 0.0


def silu(gate: torch.Tensor, up: torch.Tensor, _: Activation) -> torch.Tensor:
    return F.silu(gate) * up


def silu_clamped(gate: torch.Tensor, up: torch.Tensor, a: Activation) -> torch.Tensor:
    return F.silu(gate.clamp(max=a.limit)) * up.clamp(-a.limit, a.limit)


def swiglu_oai(gate: torch.Tensor, up: torch.Tensor, a: Activation) -> torch.Tensor:
    gate, up = gate.clamp(max=a.limit), up.clamp(-a.limit, a.limit)
    return (up + 1) * gate * torch.sigmoid(a.alpha * gate)


CATALOGUE: dict[str, Callable[[torch.Tensor, torch.Tensor, Activation], torch.Tensor]] = {
    "silu": silu,
    "silu_clamped": silu_clamped,
    "swiglu_oai": swiglu_oai,
}
HALVES: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "concat": lambda h: h.chunk(2, dim=-1),  # type: ignore[dict-item, return-value]
    "interleaved": lambda h: (h[..., 0::2], h[..., 1::2]),
}


def identify_joined(nodes: list[fx.Node], hidden: fx.Node, result: fx.Node, width: int) -> tuple[Activation, str]:
    """The activation and the row layout ("concat", "interleaved") of a region that maps `[R, 2I]` to `[R, I]`.

    Raises: Mismatch, with what is wrong, if the region is none of the catalogue or has up before gate.
    """
    probe = _probe(width, 1)
    actual = run(nodes, [result], {hidden: probe})[0]
    for layout, halves in HALVES.items():
        gate, up = halves(probe)
        found = _identify(nodes, actual, gate, up)
        if found:
            return found, layout
        swapped = _identify(nodes, actual, up, gate)
        if swapped:
            because = f"the activation is {swapped.name} of the second half times the first: up lies before gate"
            raise Mismatch(result, f"{because}; the operators want gate first")
    raise Mismatch(result, f"the activation is none of {', '.join(CATALOGUE)}, checked on {PROBE_ROWS} random rows")


def identify_apart(nodes: list[fx.Node], gate: fx.Node, up: fx.Node, result: fx.Node, width: int) -> Activation | None:
    """The activation of a region that maps two tensors `[R, I]` to one, or None."""
    probe_gate, probe_up = _probe(width, 1), _probe(width, 2)
    actual = run(nodes, [result], {gate: probe_gate, up: probe_up})[0]
    return _identify(nodes, actual, probe_gate, probe_up)


def _identify(nodes: list[fx.Node], actual: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Activation | None:
    if actual.shape != gate.shape:
        return None
    numbers = [abs(float(x)) for x in literals(nodes, float) + literals(nodes, int) if abs(x) != 0]
    for name, function in CATALOGUE.items():
        alphas = numbers if name == "swiglu_oai" else [0.0]
        limits = numbers if name != "silu" else [0.0]
        for alpha, limit in product(alphas, limits):
            candidate = Activation(name, alpha, limit)
            if torch.allclose(actual.double(), function(gate.double(), up.double(), candidate), rtol=1e-5, atol=1e-5):
                return candidate
    return None


def _probe(width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(PROBE_ROWS, width, generator=generator) * 2 - 1) * SPREAD
