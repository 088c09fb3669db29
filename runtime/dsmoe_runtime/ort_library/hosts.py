"""What the host part of each operator takes and launches, on tensors without memory: the experts, or a whole layer.

Of a layer that is what `kernels.moe` launches, but that shared experts with launches of their own have them from us:
there is no other library beside ONNX Runtime to ask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ops.activation import has_gate
from dsmoe_runtime.ops.moe import shared_layout
from dsmoe_runtime.ort_library.layer import ROUTER, Layer, MoELayer

if TYPE_CHECKING:  # they need Triton
    from dsmoe_runtime.kernels.experts import Weights
    from dsmoe_runtime.kernels.plan import Plan


class Plans(NamedTuple):
    """Of the routed experts, and of shared ones that have launches of their own."""

    routed: Plan
    shared: Plan | None = None


def inputs(layer: Layer | MoELayer, tokens: Any) -> dict[str, Tensor | None]:
    """The operator's inputs by their names, in their order, without memory; None where there is none."""
    routed = layer.routed
    halves = 2 if has_gate(routed.layout) else 1
    gate_up, down = (
        (routed.experts, halves * routed.width, routed.hidden),
        (routed.experts, routed.hidden, routed.width),
    )
    if routed.layout.endswith("_transposed"):
        gate_up, down = (gate_up[0], gate_up[2], gate_up[1]), (down[0], down[2], down[1])
    shapes: dict[str, Any] = {
        "x": (tokens, routed.hidden), "experts": (tokens, routed.top_k), "weights": (tokens, routed.top_k),
        "router_weight": (routed.experts, routed.hidden),
        "router_bias": (routed.experts,), "selection_bias": (routed.experts,),
        "gate_up": gate_up, "down": down,
        "gate_up_bias": (routed.experts, halves * routed.width) if routed.gate_up_bias else None,
        "down_bias": (routed.experts, routed.hidden) if routed.down_bias else None,
        "shared_gate_up": None, "shared_down": None,
    }  # fmt: skip
    dtypes = {"experts": "int64", "weights": "float32"}
    if isinstance(layer, MoELayer):
        for name in ROUTER:
            dtypes[name] = getattr(layer, name)
            shapes[name] = None if dtypes[name] is None else shapes[name]
        if layer.shared_width:
            shapes["shared_gate_up"] = (halves * layer.shared_width, routed.hidden)
            shapes["shared_down"] = (routed.hidden, layer.shared_width)
    return {
        name: None
        if shapes[name] is None
        else torch.empty(shapes[name], dtype=getattr(torch, dtypes.get(name, layer.dtype)), device="meta")
        for name in layer.inputs
    }


def plans_for(layer: Layer | MoELayer, given: dict[str, Any]) -> Plans:
    """As they would be chosen. Raises: TargetError for a layer that launches what is not ours."""
    from dsmoe_runtime.kernels.experts import plan_for
    from dsmoe_runtime.kernels.moe import sliced

    x, top_k, w = given["x"], layer.routed.top_k, routed_weights(layer.routed, given)
    if isinstance(layer, Layer):
        return Plans(plan_for(x, top_k, w))
    check(layer, w, given)
    if layer.shared_width:
        w = sliced(w, given["shared_gate_up"], given["shared_down"])
    plan = plan_for(x, top_k, w)
    if plan.regime != "sorted" or not layer.shared_width:
        return Plans(plan)
    return Plans(plan, sorted_plan(x, shared_weights(layer, given)))


def check(layer: MoELayer, w: Weights, given: dict[str, Any]) -> None:
    """Raises: TargetError for a layer that our kernels alone do not make, whatever the number of tokens."""
    from dsmoe_runtime.kernels import route
    from dsmoe_runtime.kernels.moe import sliceable

    reason = route.refusal(layer.routed.experts, layer.routed.top_k)
    if reason is None and layer.shared_width and not sliceable(w, given["shared_gate_up"], given["shared_down"]):
        reason = (
            f"shared experts {layer.shared_width} wide beside routed ones {w.width} wide in layout "
            f"{layer.routed.layout!r}; they must be a whole number of such experts, and the layout concat or ungated"
        )
    if reason is not None:
        raise TargetError(f"there are no kernels for {layer.key()}: {reason}; use DsMoE between standard operators")


def sorted_plan(x: Tensor, w: Weights) -> Plan:
    """Of one expert that every token visits: the best that there is, but for those that want the tokens' ids."""
    from dsmoe_runtime.kernels.choose import candidates, shape_of
    from dsmoe_runtime.kernels.experts import plan_for
    from dsmoe_runtime.kernels.gpu import named

    plan = plan_for(x, 1, w)
    if plan.regime == "sorted":
        return plan
    shape = shape_of(x.shape[0], x.shape[1], w.width, 1, 1, x.dtype)
    plain = (p for p in candidates(shape, named("H200")) if p.regime == "sorted" and not p.specialised)
    return next(plain)


def launched(layer: Layer | MoELayer, given: dict[str, Any], plans: Plans) -> dict[str, Tensor]:
    """The operator's outputs by their names; launches go where `kernels.launch` brings them."""
    from dsmoe_runtime.kernels.experts import run
    from dsmoe_runtime.kernels.moe import shared_sorted, sliced
    from dsmoe_runtime.kernels.route import gate

    x, w = given["x"], routed_weights(layer.routed, given)
    if isinstance(layer, Layer):
        return {"y": run(x, given["experts"], given["weights"], w, plans.routed)}
    router, bias, selection_bias = (given[name] for name in ROUTER)
    weights, experts = gate(
        x, router, bias, selection_bias, layer.routed.top_k, layer.score, layer.n_group, layer.topk_group,
        layer.group_score, layer.renormalize, layer.eps, layer.scale, layer.router_dtype,
    )  # fmt: skip
    extra = None
    if plans.shared is not None:
        extra = shared_sorted(x, shared_weights(layer, given), plans.shared)
    elif layer.shared_width:
        w = sliced(w, given["shared_gate_up"], given["shared_down"])
    return {"y": run(x, experts, weights, w, plans.routed, extra=extra), "experts": experts}


def routed_weights(layer: Layer, given: dict[str, Any]) -> Weights:
    """As the operator hands them to the host part."""
    from dsmoe_runtime.kernels.experts import Weights

    gate_up, down, gate_up_bias, down_bias = (given[n] for n in ("gate_up", "down", "gate_up_bias", "down_bias"))
    attributes = (layer.activation, layer.alpha, layer.limit, layer.layout)
    return Weights.of(gate_up, down, gate_up_bias, down_bias, *attributes)


def shared_weights(layer: MoELayer, given: dict[str, Any]) -> Weights:
    """The shared experts as one."""
    from dsmoe_runtime.kernels.experts import Weights

    routed, gate_up, down = layer.routed, given["shared_gate_up"][None], given["shared_down"][None]
    layout = shared_layout(routed.layout)
    return Weights.of(gate_up, down, None, None, routed.activation, routed.alpha, routed.limit, layout)
