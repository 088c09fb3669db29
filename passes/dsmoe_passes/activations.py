"""Which activation is it? The region between two GEMMs is run on chosen numbers and compared with a short catalogue.

Everything runs in float64, casts and constants of the region included, so that a region in bfloat16 is told apart as
well as one in float32: what is recognised is the function, and its last rounding is the operator's affair. Numbers such
as a limit are read off the values of the region, so that it makes no difference how the graph spells them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe_passes.region import run, value
from dsmoe_passes.result import Mismatch
from dsmoe_runtime.ops.activation import ACTIVATIONS, UNGATED, activate, joined

PROBES = 2048  # values, at least
SMALL, HUGE = 2.0**-4, 1e6  # below, and above, every limit that can be read off
CHOSEN = (0.0, SMALL, HUGE, 1.0)
NEAR = 12.0  # activations bend within it, and limits such as 7 and 10 show
NUMBERED = ("silu_clamped", "swiglu_oai")
TOLERANCE = 1e-6  # gelu and its tanh differ by 1e-3, alphas of 1.702 and 1.7 by 4e-4; constants in float32 by 1e-8
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Activation:
    """An activation as the `dsmoe` operators name it. `alpha` and `limit` are 0 where it has none."""

    name: str
    alpha: float = 0.0
    limit: float = 0.0

    def __str__(self) -> str:
        given = [f"{key} {number:g}" for key, number in (("alpha", self.alpha), ("limit", self.limit)) if number]
        return f"{self.name} ({', '.join(given)})" if given else self.name


@dataclass(frozen=True)
class Probe:
    """What a region made of gate and up, all flat and in float64; up is None where it has one input."""

    actual: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor | None

    def at(self, gate: float, up: float) -> float:
        """The region's value for one of the chosen pairs."""
        assert self.up is not None
        return float(self.actual[(self.gate == gate) & (self.up == up)][0])

    def swapped(self) -> Probe:
        """The same with gate and up exchanged."""
        assert self.up is not None
        return Probe(self.actual, self.up, self.gate)


class Wide(TorchDispatchMode):
    """Runs float64 where a cast or a new tensor asks for another of FLOATS. A float8 stays what it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def wide(a: Any) -> Any:
            return torch.float64 if isinstance(a, torch.dtype) and a in FLOATS else a

        return func(*(wide(a) for a in args), **{name: wide(a) for name, a in (kwargs or {}).items()})


def identify_joined(nodes: list[fx.Node], hidden: fx.Node, result: fx.Node, width: int) -> tuple[Activation, str]:
    """The activation and the row layout ("concat", "interleaved") of a region that maps `[R, 2I]` to `[R, I]`.

    Raises: Mismatch, with what is wrong, if the region is none of the catalogue or has up before gate.
    """
    if width % 2:
        raise Mismatch(result, f"the activation's input is {width} wide, which is not two equal halves, gate and up")
    probes = []
    for layout in ("concat", "interleaved"):

        def given(gate: torch.Tensor, up: torch.Tensor, layout: str = layout) -> dict[fx.Node, torch.Tensor]:
            return {hidden: joined(gate, up, layout)}

        probe = _probe(nodes, result, width // 2, given)
        found = _identify(probe, ACTIVATIONS)
        if found:
            return found, layout
        swapped = _identify(probe.swapped(), ACTIVATIONS)
        if swapped:
            because = f"the activation is {swapped} of the second half times the first: up lies before gate"
            raise Mismatch(result, f"{because}; the operators want gate first")
        probes.append(probe)
    raise Mismatch(result, _none_of(probes, ACTIVATIONS))


def identify_apart(nodes: list[fx.Node], gate: fx.Node, up: fx.Node, result: fx.Node, width: int) -> Activation | None:
    """The activation of a region that maps two tensors `[R, I]` to one, or None."""
    return _identify(_probe(nodes, result, width, lambda g, u: {gate: g, up: u}), ACTIVATIONS)


def identify_alone(nodes: list[fx.Node], hidden: fx.Node, result: fx.Node, width: int) -> Activation:
    """The activation of a region that maps one tensor `[R, I]` to another: experts without a gate.

    Raises: Mismatch, with what is wrong, if the region is none of the catalogue.
    """
    probe = _probe(nodes, result, width, lambda g, _: {hidden: g})
    probe = Probe(probe.actual, probe.gate, None)
    found = _identify(probe, UNGATED)
    if found is None:
        raise Mismatch(result, _none_of([probe], UNGATED))
    return found


def _identify(probe: Probe, names: tuple[str, ...]) -> Activation | None:
    return next((c for c in _candidates(probe, names) if float(_errors(probe, c).max()) <= TOLERANCE), None)


def _candidates(probe: Probe, names: tuple[str, ...]) -> Iterator[Activation]:
    """Those of `names`, with the numbers that the region's values suggest."""
    for name in names:
        alpha = limit = 0.0
        if name == "silu_clamped":  # silu(g) * clamp(u, limit), for a small g
            limit = _ratio(probe.at(SMALL, HUGE), probe.at(SMALL, SMALL)) * SMALL
        elif name == "swiglu_oai":  # (clamp(u, limit) + 1) * g * sigmoid(alpha g)
            share = _ratio(probe.at(SMALL, 0.0), SMALL)
            limit = _ratio(probe.at(SMALL, HUGE), probe.at(SMALL, 0.0)) - 1
            alpha = math.log(share / (1 - share)) / SMALL if 0 < share < 1 else math.nan
        if name not in NUMBERED or (math.isfinite(alpha) and 0 < limit < HUGE / 2):
            yield Activation(name, _short(alpha), _short(limit))


def _errors(probe: Probe, candidate: Activation) -> torch.Tensor:
    """How far the region is from a candidate at each point, as a share of what is there; NaN counts as infinite.

    Some units in the last place of the operands' product are rounding: 1 + tanh(z) of a low z is nothing else.
    """
    expected = activate(probe.gate, probe.up, candidate.name, candidate.alpha, candidate.limit)
    product = probe.gate if probe.up is None else probe.gate * probe.up
    apart = ((probe.actual - expected).abs() - 8 * torch.finfo(torch.float64).eps * product.abs()).clamp(min=0)
    return (apart / (expected.abs() + TOLERANCE)).nan_to_num(math.inf, math.inf, math.inf)


def _none_of(probes: list[Probe], names: tuple[str, ...]) -> str:
    """The reason of a refusal, with the candidate that is nearest on the average and a point where it is not."""
    tried = [(probe, candidate) for probe in probes for candidate in _candidates(probe, names)]
    probe, nearest = min(tried, key=lambda pair: float(_errors(*pair).clamp(max=1).mean()))
    worst = _telling(probe, nearest)
    gate, up = probe.gate[worst], None if probe.up is None else probe.up[worst]
    expected = activate(gate, up, nearest.name, nearest.alpha, nearest.limit)
    point = f"{gate:.4g}" if up is None else f"gate {gate:.4g} and up {up:.4g}"
    return (
        f"the activation is none of {', '.join(names)}: the nearest, {nearest}, gives {expected:.6g} for {point}, "
        f"this one {probe.actual[worst]:.6g}"
    )


def _telling(probe: Probe, nearest: Activation) -> int:
    """The point that tells the region from a candidate best: among those of usual size, if any does."""
    apart = _errors(probe, nearest) > TOLERANCE
    size = probe.gate.abs() if probe.up is None else torch.maximum(probe.gate.abs(), probe.up.abs())
    usual = apart & (size < NEAR)
    expected = activate(probe.gate, probe.up, nearest.name, nearest.alpha, nearest.limit)
    far = (probe.actual - expected).abs().nan_to_num(math.inf, math.inf, math.inf)
    return int(far.masked_fill(~(usual if usual.any() else apart), -1.0).argmax())


def _probe(
    nodes: list[fx.Node],
    result: fx.Node,
    width: int,
    given: Callable[[torch.Tensor, torch.Tensor], dict[fx.Node, torch.Tensor]],
) -> Probe:
    """The region's result on gates and ups `[R, I]`: all pairs of CHOSEN, and then random numbers of every size.

    Few rows if the region takes any number of them, else as many as the graph has.
    """
    (source, *_) = given(torch.empty(1, width), torch.empty(1, width))
    shape = value(source).shape[:-1]
    few = [max(2, -(-PROBES // width)), *(2 for _ in shape[1:])][: len(shape)]
    because = ""
    for rows in (few, [_traced(size, few[0]) for size in shape]):
        sizes = {str(size): count for size, count in zip(shape, rows, strict=True)}
        try:
            return _run(nodes, result, [*rows, width], given, sizes)
        except Mismatch:
            raise
        except Exception as error:  # whatever an operator of the region may say to numbers that it was not made for
            because = f"the activation cannot be tried out on {[*rows, width]}: {str(error).partition(chr(10))[0]}"
    raise Mismatch(result, because)


def _run(
    nodes: list[fx.Node],
    result: fx.Node,
    shape: list[int],
    given: Callable[[torch.Tensor, torch.Tensor], dict[fx.Node, torch.Tensor]],
    sizes: dict[str, int],
) -> Probe:
    """`_probe` with inputs of this shape, in as many rounds as it takes."""
    count = math.prod(shape)
    pairs = torch.tensor(list(product(CHOSEN, CHOSEN)), dtype=torch.float64)
    total = -(-PROBES // count) * count
    values, results = torch.cat((pairs, _random(total - len(pairs)))), []
    for part in values.split(count):
        gate, up = (half.reshape(shape) for half in part.unbind(1))
        with Wide():
            actual = run(nodes, [result], given(gate, up), sizes)[0]
        if list(actual.shape) != shape:
            raise ValueError(f"it makes {list(actual.shape)} of that, and not the same shape")
        results.append(actual.double().flatten())
    gates, ups = values.unbind(1)
    return Probe(torch.cat(results), gates, ups)


def _traced(size: int | torch.SymInt, unknown: int) -> int:
    """What `size` was while tracing, and `unknown` where it depends on data."""
    hint = size if isinstance(size, int) else size.node.hint
    return unknown if hint is None else int(hint)


def _random(count: int) -> torch.Tensor:
    """`[count, 2]`: half of them where activations bend, half of any size, so that no clamp is missed."""
    generator = torch.Generator().manual_seed(1)
    near = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 2 * NEAR - NEAR
    far = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 8 - 2
    signs = torch.rand(count, 2, generator=generator).sub(0.5).sign()
    return torch.where(torch.rand(count, 1, generator=generator) < 0.5, near, signs * 10**far)


def _ratio(one: float, other: float) -> float:
    return one / other if other else math.nan


def _short(number: float) -> float:
    """The shortest decimal beside `number`: 1.702 for what came out of a division as 1.7020000000000002."""
    for digits in range(1, 17):
        short = float(f"{number:.{digits}g}")
        if abs(short - number) <= 1e-12 * abs(number):
            return short
    return number
