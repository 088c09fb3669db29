"""What is known of indices before any input is: those of a top-k over E scores lie in 0 .. E-1, however they are moved.

So a clamp of them to 0 .. E-1 changes nothing, and a mask of those that are E or more masks nothing.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from dsmoe_passes.region import argument

aten = torch.ops.aten
CHOOSING = {aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim}
ARG_CHOOSING = {aten.argsort.default, aten.argsort.stable, aten.argmax.default, aten.argmin.default}
MOVING = {
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.expand.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
}
FOREVER_FALSE = {
    aten.ge.Scalar: lambda low, high, limit: high < limit,
    aten.gt.Scalar: lambda low, high, limit: high <= limit,
    aten.lt.Scalar: lambda low, high, limit: low >= limit,
    aten.le.Scalar: lambda low, high, limit: low > limit,
    aten.eq.Scalar: lambda low, high, limit: not low <= limit <= high,
}
Range = tuple[int, int]
INFINITE = 2**63


def index_range(node: object) -> Range | None:
    """Smallest and largest value that the integers of `node` can have; None where nothing is known."""
    while isinstance(node, fx.Node) and (node.target in MOVING or _is_integer_cast(node)):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target in CHOOSING:
        chosen = node.args[0]
        return _places(chosen) if node.args[1] == 1 else index_range(chosen.args[0])
    if node.target in ARG_CHOOSING:
        return _places(node)
    if node.target is aten.clamp.default and is_integer(node):
        return _clamped(node)
    return None


def is_idle_clamp(node: fx.Node) -> bool:
    """Whether `node` clamps integers to a range in which they lie anyway."""
    if node.target is not aten.clamp.default or not is_integer(node):
        return False
    known, low, high = index_range(node.args[0]), argument(node, 1, "min"), argument(node, 2, "max")
    if known is None or not all(bound is None or isinstance(bound, int) for bound in (low, high)):
        return False
    return (low is None or low <= known[0]) and (high is None or high >= known[1])  # type: ignore[operator]


def is_false(mask: object) -> bool:
    """Whether a mask of indices is False everywhere, whatever the inputs."""
    while isinstance(mask, fx.Node) and mask.target in MOVING:
        mask = mask.args[0]
    if not isinstance(mask, fx.Node) or mask.target not in FOREVER_FALSE:
        return False
    known, limit = index_range(mask.args[0]), mask.args[1]
    if known is None or not isinstance(limit, int | float):
        return False
    return bool(FOREVER_FALSE[mask.target](*known, limit))


def is_integer(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dtype in (torch.int32, torch.int64)


def _is_integer_cast(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default and is_integer(node) and is_integer(node.args[0])  # type: ignore[arg-type]


def _places(chosen: fx.Node) -> Range | None:
    """The places along the dimension that a top-k, a sort, a maximum or an argsort chooses from."""
    source = chosen.args[0]
    val = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(val, torch.Tensor) or val.dim() == 0:
        return None
    flat = chosen.target in (aten.argmax.default, aten.argmin.default)  # without a dimension these take all of them
    dim = argument(chosen, 2 if chosen.target is aten.topk.default else 1, "dim", None if flat else -1)
    if not isinstance(dim, int) or not isinstance(val.shape[dim], int):
        return None
    return 0, val.shape[dim] - 1


def _clamped(node: fx.Node) -> Range | None:
    known, low, high = index_range(node.args[0]), argument(node, 1, "min"), argument(node, 2, "max")
    lowest, highest = known or (-INFINITE, INFINITE)
    if isinstance(low, int):
        lowest, highest = max(lowest, low), max(highest, low)
    if isinstance(high, int):
        lowest, highest = min(lowest, high), min(highest, high)
    if not all(bound is None or isinstance(bound, int) for bound in (low, high)):
        return None
    return (lowest, highest) if abs(lowest) < INFINITE and abs(highest) < INFINITE else None
