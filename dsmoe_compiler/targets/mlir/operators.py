"""Which function computes a node, and with what: the waist between graphs and generated kernels.

    aten.linear                        linear(x [M, K], w [N, K], bias [N]?, y [M, N])
    dsmoe.moe, experts, route          functions of the same names
    aten.scaled_dot_product_attention  attention(q, k, v [B, H, S | C, D], mask?, y)
    aten.topk                          topk(x [M, N], values [M, K], indices [M, K])
    aten.index_copy_, aten.copy_       write_slots, write_over, into the caller's memory

Functions read views where they lie. What none of them takes is glue.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from dsmoe_compiler.targets.lower import positional
from dsmoe_compiler.targets.mlir.layout import View, tensor_of
from dsmoe_compiler.targets.mlir.sizes import same
from dsmoe_compiler.targets.mlir.slots import write_over, write_slots
from dsmoe_compiler.targets.mlir.topk import topk_function
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.attention_lowering import attention_function
from dsmoe_runtime.mlir.attention_place import AttentionSpec
from dsmoe_runtime.mlir.experts_lowering import ExpertsSpec, experts_function
from dsmoe_runtime.mlir.function import Function
from dsmoe_runtime.mlir.gate_up import Activation
from dsmoe_runtime.mlir.levels import Level
from dsmoe_runtime.mlir.linear_lowering import LinearSpec, linear_function
from dsmoe_runtime.mlir.moe_lowering import MoeSpec, moe_function
from dsmoe_runtime.mlir.route_lowering import RouteSpec, route_function
from dsmoe_runtime.mlir.row_tiles import MOST

aten, ops = torch.ops.aten, torch.ops.dsmoe
Where = Callable[[fx.Node], View]
FLOATS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Operation:
    """A function and what it is called with, outputs last. `made` are the nodes whose values it writes anew."""

    function: Function
    operands: tuple[View, ...]
    made: tuple[fx.Node, ...] = ()


@functools.cache
def function_of(make: Callable[[Any], Function], spec: Any) -> Function:
    """The function of a spec; its text is written once."""
    return make(spec)


def operation(node: fx.Node, where: Where, level: Level) -> Operation | None:
    """What computes a node, if one function does."""
    make = MAKERS.get(node.target)
    return None if make is None else make(node, where, level)


def _linear(node: fx.Node, where: Where, level: Level) -> Operation | None:
    x, w, bias = (*node.args, None)[:3]
    nodes = [n for n in (x, w, bias) if isinstance(n, fx.Node)]
    views = [where(n) for n in nodes]
    y = where(node).flat_rows()
    rows = views[0].flat_rows()
    if rows is None or y is None or not all(v.inner_is_one for v in views):
        return None
    if views[0].element not in FLOATS or views[1].element != views[0].element or len(views[1].sizes) != 2:
        return None
    spec = LinearSpec(views[0].element, y.element, views[2].element if bias is not None else None, level)
    return Operation(function_of(linear_function, spec), (rows, *views[1:], y), (node,))


def _moe(node: fx.Node, where: Where, level: Level) -> Operation:
    (x, router, router_bias, bias, top_k, score, n_group, topk_group, group_score, renormalize, eps, scale,
     router_dtype, gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout, shared_gate_up,
     shared_down, shared_gate) = positional(node)  # fmt: skip
    kind = {n: where(n).element for n in (x, router, router_bias, bias) if n is not None}
    if router_dtype == "activation" and kind[x] != "f32":
        raise TargetError(f"{node.name}: router_dtype is 'activation' and x {kind[x]}; mlir-cpu's gate is float32")
    spec = MoeSpec(
        ExpertsSpec(
            kind[x], Activation(activation, alpha, limit), layout, gate_up_bias is not None, down_bias is not None,
            level,
        ),
        RouteSpec(
            top_k, score, n_group, topk_group, group_score, renormalize, eps, scale, kind.get(bias), level
        ),
        kind[router], kind.get(router_bias), shared_gate_up is not None, shared_gate is not None,
    )  # fmt: skip
    given = (x, router, router_bias, bias, gate_up, down, gate_up_bias, down_bias, shared_gate_up, shared_down,
             shared_gate)  # fmt: skip
    return _with_parts(function_of(moe_function, spec), [where(n) for n in given if n is not None], node, where)


def _experts(node: fx.Node, where: Where, level: Level) -> Operation:
    x, ids, weights, gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout = positional(node)
    spec = ExpertsSpec(
        where(x).element, Activation(activation, alpha, limit), layout, gate_up_bias is not None,
        down_bias is not None, level,
    )  # fmt: skip
    given = [where(n) for n in (x, ids, weights, gate_up, down, gate_up_bias, down_bias) if n is not None]
    return Operation(function_of(experts_function, spec), (*given, where(node)), (node,))


def _route(node: fx.Node, where: Where, level: Level) -> Operation:
    logits, bias, top_k, score, n_group, topk_group, group_score, renormalize, eps, scale = positional(node)
    if where(logits).element != "f32":
        raise TargetError(f"{node.name}: logits are {where(logits).element}; mlir-cpu's gate is float32")
    spec = RouteSpec(
        top_k, score, n_group, topk_group, group_score, renormalize, eps, scale,
        None if bias is None else where(bias).element, level,
    )  # fmt: skip
    return _with_parts(
        function_of(route_function, spec), [where(n) for n in (logits, bias) if n is not None], node, where
    )


def _attention(node: fx.Node, where: Where, level: Level) -> Operation | None:
    q, k, v, mask, dropout, causal, scale, _ = positional(node)
    views = [where(n) for n in (q, k, v)]
    if dropout or any(len(view.sizes) != 4 or not view.inner_is_one for view in (*views, where(node))):
        return None
    if views[0].element not in FLOATS or len({view.element for view in views}) != 1 or (causal and mask is not None):
        return None
    kind = "causal" if causal else "none"
    if mask is not None:
        seen = where(mask).leading_ones(4)
        if not seen.inner_is_one or not same(seen.sizes[-1], views[1].sizes[2]):
            return None
        kind = seen.element
        views.append(seen)
    depth = views[0].sizes[-1]
    if scale is None and not isinstance(depth, int):
        return None
    sizes = (*views[0].sizes[1:3], views[1].sizes[1])
    few = all(isinstance(size, int) for size in sizes) and sizes[0] // sizes[2] * sizes[1] <= MOST
    spec = AttentionSpec(views[0].element, kind, depth**-0.5 if scale is None else scale, level, few)
    return Operation(function_of(attention_function, spec), (*views, where(node)), (node,))


def _topk(node: fx.Node, where: Where, _level: Level) -> Operation | None:
    x, _, dim, largest, _ = positional(node)
    rows = where(x).flat_rows()
    if rows is None or not rows.inner_is_one or not largest or rows.element not in FLOATS:
        return None
    if dim not in (-1, len(where(x).sizes) - 1):
        return None
    found = _with_parts(topk_function(rows.element), [rows], node, where)
    made = [view.flat_rows() for view in found.operands[1:]]
    return Operation(found.function, (rows, *(view for view in made if view is not None)), found.made)


def _with_parts(function: Function, given: list[View], node: fx.Node, where: Where) -> Operation:
    """Of a node that gives several values; one that nobody takes gets memory all the same."""
    parts: dict[int, fx.Node] = {}
    for user in node.users:
        if user.target is operator.getitem:
            parts.setdefault(cast(int, user.args[1]), user)
    values = node.meta["val"]
    for index, value in enumerate(values):
        if index not in parts:
            with node.graph.inserting_after(node):
                parts[index] = node.graph.call_function(operator.getitem, (node, index))
            parts[index].meta["val"] = value
    made = tuple(parts[index] for index in range(len(values)))
    return Operation(function, (*given, *(where(n) for n in made)), made)


def _write_slots(node: fx.Node, where: Where, _level: Level) -> Operation | None:
    target, dim, index, source = cast(tuple[fx.Node, int, fx.Node, fx.Node], node.args)
    views = [where(n) for n in (target, index, source)]
    rank = len(views[0].sizes)
    if rank < 2 or dim % rank == rank - 1 or not all(v.inner_is_one for v in views):
        return None
    return Operation(write_slots(views[0].element, rank, dim % rank), tuple(views))


def _write_over(node: fx.Node, where: Where, _level: Level) -> Operation | None:
    nodes = cast(tuple[fx.Node, fx.Node], node.args[:2])
    (target, source), (a, b) = (where(n) for n in nodes), (tensor_of(n) for n in nodes)
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype or not a.dim():
        return None
    if not (target.inner_is_one and source.inner_is_one):
        return None
    return Operation(write_over(target.element, len(target.sizes)), (target, source))


MAKERS: dict[Any, Callable[[fx.Node, Where, Level], Operation | None]] = {
    aten.linear.default: _linear,
    aten.scaled_dot_product_attention.default: _attention,
    aten.topk.default: _topk,
    ops.moe.default: _moe,
    ops.experts.default: _experts,
    ops.route.default: _route,
    aten.index_copy_.default: _write_slots,
    aten.copy_.default: _write_over,
}
