"""What a gate's region computes, in exact arithmetic: it is run in float64 on 2,048 rows of random logits.

Every floating-point dtype that the region names is read as float64, so that rounding hides nothing: a factor, a soft
cap or an epsilon that bfloat16 would swallow shows. Rows are many because few cannot tell gates apart: with two, sums
of two and maxima pick the same groups by chance. A region that has the number of tokens of its trace written into it
gets that many at a time.

T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dsmoe_passes.gate_region import Region
from dsmoe_passes.region import is_symbol, size_hint, value
from dsmoe_passes.result import Mismatch

PROBE_ROWS = 2048
SPREAD, WIDE = 2.0, 20.0  # of half of the rows as it is in models; of the others so that a clamp or a cap shows
BIASES = (0.0, -3.0)  # means: with the second, every score plus bias is negative
FAILURES = (RuntimeError, IndexError, TypeError, ValueError)


@dataclass(frozen=True)
class Probe:
    """Random logits `[T, E]` and bias `[E]`, and the weights and ids `[T, K]` that the region gives for them."""

    logits: Tensor
    bias: Tensor | None
    weights: Tensor
    experts: Tensor


def probe(region: Region) -> list[Probe]:
    """Run `region`, with two biases if it reads one. Raises: Mismatch, if it cannot be run on its own."""
    for node in region.inside:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Mismatch(node, f"the gate draws random numbers ({node.target}); dsmoe::route draws none")
    traced = value(region.logits).shape[0]
    rows = traced if isinstance(traced, int) else int(traced.node.hint)
    if rows == 0:
        raise Mismatch(region.logits, "the graph was traced without a token: there is nothing to probe its gate with")
    generator = torch.Generator().manual_seed(0)
    size = (-(-PROBE_ROWS // rows) * rows, region.n_experts)
    logits = SPREAD * torch.randn(size, generator=generator, dtype=torch.float64)
    logits[::2] = WIDE * (2 * torch.rand(logits[::2].shape, generator=generator, dtype=torch.float64) - 1)
    biases: list[Tensor | None] = [None]
    if region.bias is not None:
        draws = torch.randn(len(BIASES), region.n_experts, generator=generator, dtype=torch.float64)
        biases = [draw + mean for draw, mean in zip(draws, BIASES, strict=True)]
    return [_probe(region, logits, bias, str(traced), rows) for bias in biases]


def _probe(region: Region, logits: Tensor, bias: Tensor | None, symbol: str, rows: int) -> Probe:
    """All rows at once, or else `rows` at a time."""
    wanted = (len(logits), region.top_k)
    try:
        weights, experts = _run(region, logits, bias, {symbol: len(logits)})
        if tuple(weights.shape) == tuple(experts.shape) == wanted:
            return Probe(logits, bias, weights, experts)
    except FAILURES:
        pass
    at_a_time = logits.view(-1, rows, region.n_experts)
    try:
        weights, experts = torch.vmap(lambda part: _run(region, part, bias, {symbol: rows}))(at_a_time)
    except FAILURES as error:
        because = f"the region cannot be run on its own: {str(error).splitlines()[0]}"
        raise Mismatch(region.experts, because) from error
    weights, experts = weights.flatten(0, 1), experts.flatten(0, 1)
    if tuple(weights.shape) != wanted or tuple(experts.shape) != wanted:
        raise Mismatch(region.experts, f"{len(logits)} rows of logits give ids {tuple(experts.shape)}, not {wanted}")
    return Probe(logits, bias, weights, experts)


def _run(region: Region, logits: Tensor, bias: Tensor | None, sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    env: dict[fx.Node, Any] = {region.logits: logits}
    if region.bias is not None and bias is not None:
        env[region.bias] = bias.view(value(region.bias).shape)

    def lookup(node: fx.Node) -> Any:
        if node not in env:
            if not is_symbol(node):
                raise Mismatch(node, f"{node.name} is needed to probe the gate but lies outside it")
            env[node] = sizes.get(str(node.meta["val"]), size_hint(node))
        return env[node]

    for node in region.inside:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lookup)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        assert callable(node.target)
        env[node] = node.target(*map(_exact, args), **{k: _exact(v) for k, v in kwargs.items()})
    return env[region.weights], env[region.experts].long()


def _exact(arg: Any) -> Any:
    return torch.float64 if isinstance(arg, torch.dtype) and arg.is_floating_point else arg
