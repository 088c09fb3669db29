"""dsmoe::experts_backward: gradients of the routed experts, from their inputs and what training kept.

T tokens, H hidden size, E experts, I expert width, K experts per token, N = T K slots, n those of one expert.
"""

import torch
from torch import Tensor

from dsmoe_runtime.ops.activation import activate, activate_backward, halves, joined
from dsmoe_runtime.ops.cuda import register_cuda
from dsmoe_runtime.ops.experts import ARGUMENTS, accumulation_dtype, dispatch
from dsmoe_runtime.ops.library import refuse_second_backward, register


def experts_backward(
    grad: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    weight_grads: bool,
    joint: Tensor | None = None,
    slots: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up, down, gate_up_bias and down_bias, given that of y, each in its own dtype.

    joint, slots, offsets: what `experts_training` kept; None or empty: joint is computed again. So is the hidden state,
    and the gradient of a weight is `<down^T grad, hidden>`, so that the answers are not. All in the accumulation dtype.
    The last four are empty (`[0]`) if `weight_grads` is false, a bias's also if there is none.
    """
    acc = accumulation_dtype(x)
    transposed = layout.endswith("_transposed")
    if transposed:
        gate_up, down = gate_up.mT, down.mT
    grad_x_NH = x.new_zeros((experts.numel(), x.shape[1]), dtype=acc)
    grad_weights_N = weights.new_zeros(experts.numel(), dtype=acc)
    grad_gate_up = torch.zeros_like(gate_up) if weight_grads else x.new_empty(0)
    grad_down = torch.zeros_like(down) if weight_grads else x.new_empty(0)
    grad_gate_up_bias = _zeros_for(gate_up_bias, x, weight_grads)
    grad_down_bias = _zeros_for(down_bias, x, weight_grads)

    sorted_slots, parts = dispatch(experts, gate_up.shape[0])
    for expert, start, stop in parts:
        slots_n = sorted_slots[start:stop]
        tokens = slots_n.div(experts.shape[1], rounding_mode="floor")
        x_nH, grad_nH = x[tokens].to(acc), grad[tokens].to(acc)
        weight_n1 = weights.reshape(-1)[slots_n, None].to(acc)
        gate_up_e, down_e = gate_up[expert].to(acc), down[expert].to(acc)
        if joint is not None and len(joint):
            joint_n2I = joint[start:stop].to(acc)
        else:
            joint_n2I = x_nH @ gate_up_e.T
            if gate_up_bias is not None:
                joint_n2I = joint_n2I + gate_up_bias[expert].to(acc)
        gate_nI, up_nI = halves(joint_n2I, layout)
        hidden_nI = activate(gate_nI, up_nI, activation, alpha, limit)

        grad_hidden_nI = grad_nH @ down_e
        grad_weights_N[slots_n] = (grad_hidden_nI * hidden_nI).sum(-1)
        if down_bias is not None:
            grad_weights_N[slots_n] += grad_nH @ down_bias[expert].to(acc)
        grad_gate_nI, grad_up_nI = activate_backward(
            grad_hidden_nI * weight_n1, gate_nI, up_nI, activation, alpha, limit
        )
        grad_joint_n2I = joined(grad_gate_nI, grad_up_nI, layout)
        grad_x_NH[slots_n] = grad_joint_n2I @ gate_up_e
        if weight_grads:
            grad_answer_nH = grad_nH * weight_n1
            grad_gate_up[expert] = grad_joint_n2I.T @ x_nH
            grad_down[expert] = grad_answer_nH.T @ hidden_nI
            if gate_up_bias is not None:
                grad_gate_up_bias[expert] = grad_joint_n2I.sum(0)
            if down_bias is not None:
                grad_down_bias[expert] = grad_answer_nH.sum(0)

    if weight_grads and transposed:
        grad_gate_up, grad_down = grad_gate_up.mT.contiguous(), grad_down.mT.contiguous()
    grad_x = grad_x_NH.view(*experts.shape, x.shape[1]).sum(1)
    grad_weights = grad_weights_N.view(experts.shape).to(weights.dtype)
    return grad_x.to(x.dtype), grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias


def _zeros_for(bias: Tensor | None, x: Tensor, wanted: bool) -> Tensor:
    return x.new_zeros(bias.shape) if bias is not None and wanted else x.new_empty(0)


def _experts_backward_fake(
    grad: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    weight_grads: bool,
    joint: Tensor | None = None,
    slots: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty_for(weight: Tensor | None) -> Tensor:
        return x.new_empty(weight.shape if weight is not None and weight_grads else 0)

    return (
        x.new_empty(x.shape),
        weights.new_empty(weights.shape),
        empty_for(gate_up),
        empty_for(down),
        empty_for(gate_up_bias),
        empty_for(down_bias),
    )


KEPT = "Tensor? joint=None, Tensor? slots=None, Tensor? offsets=None"
register(
    f"experts_backward(Tensor grad, {ARGUMENTS}, bool weight_grads, {KEPT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    experts_backward,
    _experts_backward_fake,
)
refuse_second_backward("experts_backward")
register_cuda("experts_backward", experts_backward)
