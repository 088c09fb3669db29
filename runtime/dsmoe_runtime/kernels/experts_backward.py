"""dsmoe::experts_backward on a GPU: four grouped GEMMs from what the forward kept, and the sums between them.

T tokens, H hidden size, E experts, I expert width, K experts per token, P = T K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe_runtime.kernels.backward_gemms import matrix_grad, row_grad
from dsmoe_runtime.kernels.backward_rows import (
    Saved,
    back_through_activation,
    bias_grad,
    order_of,
    sorted_rows,
    token_sums,
)
from dsmoe_runtime.kernels.experts import Weights
from dsmoe_runtime.kernels.experts_training import keep
from dsmoe_runtime.kernels.plan_backward import BackwardPlan, plan_backward


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
    *,
    plan: BackwardPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator's six gradients; see `ops.experts_backward`, whose rule this is held to."""
    plan = plan or plan_backward(x.dtype)
    if experts.numel() == 0:
        return _zeros(x, weights, gate_up, down, gate_up_bias, down_bias, weight_grads)
    grad, x, experts, weights = _rows(grad), _rows(x), experts.contiguous(), weights.contiguous()
    if joint is None or slots is None or offsets is None or len(joint) == 0:
        _, joint, (slots, offsets, *_) = keep(
            x, experts, Weights.of(gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout)
        )
    num_experts, transposed = gate_up.shape[0], layout.endswith("_transposed")
    saved = Saved(joint, slots, offsets, num_experts)
    order = order_of(saved, plan.dgrad_up.block_m)
    grad_sorted, *x_sorted = sorted_rows(grad, x if weight_grads else None, experts, order, num_experts)
    hidden = row_grad(grad_sorted, down.mT if transposed else down, saved, order, plan.dgrad_down, plan)
    act = (activation, alpha, limit, layout.startswith("interleaved"))
    grad_joint, products = back_through_activation(hidden, weights, saved, act, weight_grads)  # weights hidden in place
    grad_rows = row_grad(grad_joint, gate_up.mT if transposed else gate_up, saved, order, plan.dgrad_up, plan)
    grad_x, grad_weights = token_sums(grad, weights, experts, grad_rows, products, order, num_experts, down_bias)
    if not weight_grads:
        return grad_x, grad_weights, x.new_empty(0), x.new_empty(0), x.new_empty(0), x.new_empty(0)
    del grad_rows
    up, back = (grad_joint, x_sorted[0]), (grad_sorted, hidden)
    if transposed:
        up, back = up[::-1], back[::-1]
    return (
        grad_x,
        grad_weights,
        matrix_grad(*up, saved, plan.wgrad_gate_up, plan),
        matrix_grad(*back, saved, plan.wgrad_down, plan),
        x.new_empty(0) if gate_up_bias is None else bias_grad(grad_joint, None, saved),
        x.new_empty(0) if down_bias is None else bias_grad(grad_sorted, weights, saved),
    )


def _rows(table: Tensor) -> Tensor:
    """The table with rows of unit stride, which a loss that only sums does not give."""
    return table if table.stride(1) == 1 and table.stride(0) >= table.shape[1] else table.contiguous()


def _zeros(
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of no slot at all."""
    g, d, b, c = (
        x.new_zeros(t.shape if t is not None and weight_grads else 0) for t in (gate_up, down, gate_up_bias, down_bias)
    )
    return x.new_zeros(x.shape), torch.zeros_like(weights), g, d, b, c
