"""dsmoe::moe_backward: gradients of a whole layer, from its inputs, the experts it chose and what training kept.

T tokens, H hidden size, E experts, S shared width, K experts per token.
"""

import torch
from torch import Tensor

from dsmoe_runtime.ops.activation import activate, activate_backward, halves, joined
from dsmoe_runtime.ops.experts import accumulation_dtype
from dsmoe_runtime.ops.experts_backward import KEPT
from dsmoe_runtime.ops.library import refuse_second_backward, register
from dsmoe_runtime.ops.moe import ROUTED, SHARED, router_logits, shared_layout
from dsmoe_runtime.ops.route import route_backward, weights_of


def moe_backward(
    grad: Tensor,
    x: Tensor,
    experts: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    score: str,
    renormalize: bool,
    eps: float,
    scale: float,
    router_dtype: str,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    shared_gate: Tensor | None,
    weight_grads: bool,
    joint: Tensor | None = None,
    slots: Tensor | None = None,
    offsets: Tensor | None = None,
    shared_joint: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x, router_weight, router_bias, gate_up, down, their biases, and the three shared weights.

    The chain rule over the parts of `moe` for the `experts` it chose; a weight that is None, or any expert weight if
    `weight_grads` is false, gets an empty gradient (`[0]`). joint, slots, offsets, shared_joint: what `moe_training`
    kept; None or empty: computed again.
    """
    acc = accumulation_dtype(x)
    logits = router_logits(x, router_weight, router_bias, router_dtype)
    weights = weights_of(logits, experts, score, renormalize, eps, scale)
    grad_x, grad_weights, *grad_experts = torch.ops.dsmoe.experts_backward(
        grad,
        x,
        experts,
        weights,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        activation,
        alpha,
        limit,
        layout,
        weight_grads,
        joint,
        slots,
        offsets,
    )
    grad_logits = route_backward(grad_weights, logits, experts, score, renormalize, eps, scale).to(acc)
    grad_x = grad_x.to(acc) + grad_logits @ router_weight.to(acc)
    grad_router_weight = (grad_logits.T @ x.to(acc)).to(router_weight.dtype)
    grad_router_bias = x.new_empty(0) if router_bias is None else grad_logits.sum(0).to(router_bias.dtype)
    grad_shared = [x.new_empty(0), x.new_empty(0), x.new_empty(0)]
    if shared_gate_up is not None and shared_down is not None:
        grad_x_shared, *grad_shared = _shared_backward(
            grad, x, shared_gate_up, shared_down, shared_gate, (activation, alpha, limit), layout, shared_joint
        )
        grad_x = grad_x + grad_x_shared
    return grad_x.to(x.dtype), grad_router_weight, grad_router_bias, *grad_experts, *grad_shared


def _shared_backward(
    grad: Tensor,
    x: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
    shared_gate: Tensor | None,
    activation: tuple[str, float, float],
    layout: str,
    joint: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (accumulation dtype), shared_gate_up, shared_down and shared_gate (`[0]` if None).

    Elementwise in the accumulation dtype, and on the CPU so are the products. Elsewhere these take x's dtype, for the
    tensor cores, which accumulate in float32.
    """
    acc = accumulation_dtype(x)
    dtype = acc if x.device.type == "cpu" else x.dtype
    x_TH, grad_TH, gate_up, down = x.to(dtype), grad.to(dtype), shared_gate_up.to(dtype), shared_down.to(dtype)
    joint_T2S = joint if joint is not None and joint.dim() == 2 else x_TH @ gate_up.T
    gate_TS, up_TS = halves(joint_T2S.to(acc), shared_layout(layout))
    hidden_TS = activate(gate_TS, up_TS, *activation)
    grad_hidden_TS = (grad_TH @ down).to(acc)
    grad_x = torch.zeros_like(x_TH, dtype=acc)
    grad_gate = x.new_empty(0)
    if shared_gate is not None:
        open_T1 = (x_TH @ shared_gate.to(dtype).T).to(acc).sigmoid()
        grad_open_T1 = (grad_hidden_TS * hidden_TS).sum(-1, keepdim=True) * open_T1 * (1 - open_T1)
        grad_x = grad_open_T1 * shared_gate.to(acc)
        grad_gate = (grad_open_T1.T @ x_TH.to(acc)).to(x.dtype)
        grad_TH, grad_hidden_TS = (grad_TH * open_T1).to(dtype), grad_hidden_TS * open_T1
    grads = activate_backward(grad_hidden_TS, gate_TS, up_TS, *activation)
    grad_joint_T2S = joined(*grads, shared_layout(layout)).to(dtype)
    grad_gate_up, grad_down = grad_joint_T2S.T @ x_TH, grad_TH.T @ hidden_TS.to(dtype)
    return grad_x + grad_joint_T2S @ gate_up, grad_gate_up.to(x.dtype), grad_down.to(x.dtype), grad_gate


def _moe_backward_fake(
    grad: Tensor,
    x: Tensor,
    experts: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    score: str,
    renormalize: bool,
    eps: float,
    scale: float,
    router_dtype: str,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    shared_gate: Tensor | None,
    weight_grads: bool,
    joint: Tensor | None = None,
    slots: Tensor | None = None,
    offsets: Tensor | None = None,
    shared_joint: Tensor | None = None,
) -> tuple[Tensor, ...]:
    def empty_for(weight: Tensor | None, wanted: bool = True) -> Tensor:
        return x.new_empty(0) if weight is None or not wanted else weight.new_empty(weight.shape)

    return (
        x.new_empty(x.shape),
        empty_for(router_weight),
        empty_for(router_bias),
        *(empty_for(weight, weight_grads) for weight in (gate_up, down, gate_up_bias, down_bias)),
        *(empty_for(weight) for weight in (shared_gate_up, shared_down, shared_gate)),
    )


register(
    "moe_backward(Tensor grad, Tensor x, Tensor experts, Tensor router_weight, Tensor? router_bias, str score,"
    f" bool renormalize, float eps, float scale, str router_dtype, {ROUTED}, {SHARED}, bool weight_grads,"
    f" {KEPT}, Tensor? shared_joint=None)"
    f" -> ({', '.join(['Tensor'] * 10)})",
    moe_backward,
    _moe_backward_fake,
)
refuse_second_backward("moe_backward")
