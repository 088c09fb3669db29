"""dsmoe::experts: the routed experts of a layer, from dispatch to the weighted sum of their answers.

T tokens, H hidden size, E experts, I expert width, K experts per token, N = T K slots, A = the accumulation dtype.
"""

from typing import Any

import torch
from torch import Tensor

from dsmoe_runtime.errors import ConfigError, InputError
from dsmoe_runtime.ops.activation import ACTIVATIONS, activate, activate_backward
from dsmoe_runtime.ops.library import refuse_second_backward, register, register_autograd
from dsmoe_runtime.ops.mlp import mlp

LAYOUTS = ("concat", "interleaved", "concat_transposed", "interleaved_transposed")


def check_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    layout: str,
) -> None:
    """Refuse expert weights that do not fit each other or the tokens, with both values."""
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    if x.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3:
        raise InputError(
            f"x, gate_up and down must have 2, 3 and 3 dimensions, not {x.dim()}, {gate_up.dim()}, {down.dim()}"
        )
    hidden, (num_experts, rows, columns) = x.shape[1], gate_up.shape
    transposed = layout.endswith("_transposed")
    width = (columns if transposed else rows) // 2
    wanted = (num_experts, hidden, 2 * width) if transposed else (num_experts, 2 * width, hidden)
    if gate_up.shape != wanted:
        raise InputError(f"gate_up is {tuple(gate_up.shape)}; x {tuple(x.shape)} and layout {layout!r} want {wanted}")
    wanted = (num_experts, width, hidden) if transposed else (num_experts, hidden, width)
    if down.shape != wanted:
        raise InputError(
            f"down is {tuple(down.shape)}; gate_up {tuple(gate_up.shape)} and layout {layout!r} want {wanted}"
        )
    if gate_up_bias is not None and gate_up_bias.shape != (num_experts, 2 * width):
        raise InputError(f"gate_up_bias is {tuple(gate_up_bias.shape)}; gate_up wants {(num_experts, 2 * width)}")
    if down_bias is not None and down_bias.shape != (num_experts, hidden):
        raise InputError(f"down_bias is {tuple(down_bias.shape)}; down wants {(num_experts, hidden)}")
    if not x.is_floating_point():
        raise InputError(f"x is {x.dtype}; it must be floating point")
    check_alike(x, gate_up=gate_up, down=down, gate_up_bias=gate_up_bias, down_bias=down_bias)


def check_alike(x: Tensor, **others: Tensor | None) -> None:
    """Refuse tensors of another dtype or device than `x`; nothing is cast or moved in silence."""
    for name, other in others.items():
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise InputError(
                f"{name} is {other.dtype} on {other.device}, x is {x.dtype} on {x.device}; cast or move one"
            )


def _check(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    layout: str,
) -> None:
    check_experts(x, gate_up, down, gate_up_bias, down_bias, activation, layout)
    if experts.dim() != 2 or weights.shape != experts.shape or experts.shape[0] != x.shape[0]:
        raise InputError(
            f"experts {tuple(experts.shape)} and weights {tuple(weights.shape)} must both be [T, K] for the T of "
            f"x {tuple(x.shape)}"
        )
    if experts.dtype not in (torch.int64, torch.int32) or not weights.is_floating_point():
        raise InputError(
            f"experts must be int64 or int32 and weights floating point, not {experts.dtype}, {weights.dtype}"
        )
    if experts.device != x.device or weights.device != x.device:
        raise InputError(
            f"x is on {x.device}, experts on {experts.device}, weights on {weights.device}; move them together"
        )


def experts(
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
) -> Tensor:
    """The rule of dsmoe::experts: `y[t] = sum_k weights[t, k] * expert(experts[t, k])(x[t])` (DeepSeekMoE, eq. 9).

    Args:
        x: `[T, H]` in any strides; T may be 0.
        experts: `[T, K]` int64 or int32; a slot whose id is outside `[0, E)` is skipped, whatever its weight.
        weights: `[T, K]`, floating point.
        gate_up: layout "concat" `[E, 2I, H]`, the gate's rows first; "interleaved" `[E, 2I, H]`, its rows the even
            ones; "concat_transposed" and "interleaved_transposed" `[E, H, 2I]`, the same on columns.
        down: `[E, H, I]`, or `[E, I, H]` for the transposed layouts.
        gate_up_bias, down_bias: `[E, 2I]`, in the order of gate_up's rows, and `[E, H]`, or None.
        activation, alpha, limit: see `dsmoe_runtime.ops.activation`.

    Returns `[T, H]` in x's dtype, never a view of an input. Slots are summed in float32 (float64 for float64), each
    token's in the order of k: the same input gives the same bits on every run.
    """
    _check(x, experts, weights, gate_up, down, gate_up_bias, down_bias, activation, layout)
    return run_experts(
        x, experts, weights, gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout
    ).to(x.dtype)


def run_experts(
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
) -> Tensor:
    """`experts` without its checks and its last rounding: `[T, H]` in the accumulation dtype."""
    if layout.endswith("_transposed"):
        gate_up, down = gate_up.mT, down.mT
    interleaved = layout.startswith("interleaved")
    slots, parts = dispatch(experts, gate_up.shape[0])
    tokens = slots.div(max(1, experts.shape[1]), rounding_mode="floor")
    answers = x.new_empty((len(slots), x.shape[1]), dtype=accumulation_dtype(x))
    for expert, start, stop in parts:
        # Rows of its own: slices of one gather would differ in alignment, and with it in bits, by what precedes them.
        answers[start:stop] = mlp(
            x.index_select(0, tokens[start:stop]),
            gate_up[expert],
            down[expert],
            None if gate_up_bias is None else gate_up_bias[expert],
            None if down_bias is None else down_bias[expert],
            activation,
            alpha,
            limit,
            interleaved,
        )
    return combine(answers, slots, weights)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64: the dtype in which slots are summed and gradients are computed."""
    return torch.promote_types(x.dtype, torch.float32)


def dispatch(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """The slots that are not skipped, sorted by expert, and the part (expert, start, stop) of each expert that has any.

    A slot is an index into the N = T K entries of `experts_TK`; those of one expert are ascending.
    """
    ids_N, order_N = experts_TK.reshape(-1).sort(stable=True)
    edges = torch.arange(num_experts + 1, dtype=ids_N.dtype, device=ids_N.device)
    bounds = torch.searchsorted(ids_N, edges).tolist()
    parts = [(e, bounds[e] - bounds[0], bounds[e + 1] - bounds[0]) for e in range(num_experts)]
    return order_N[bounds[0] : bounds[-1]], [part for part in parts if part[1] < part[2]]


def combine(answers: Tensor, slots: Tensor, weights_TK: Tensor) -> Tensor:
    """`[T, H]`: each token's weighted answers, summed in the order of k and in their dtype; `slots` by `dispatch`."""
    weights_TK = weights_TK.to(answers.dtype)
    if len(slots) == weights_TK.numel():
        answers_NH = torch.empty_like(answers)
    else:  # a skipped slot answers 0 with weight 0, whatever its weight was
        answers_NH = answers.new_zeros(weights_TK.numel(), answers.shape[1])
        kept = torch.zeros_like(weights_TK, dtype=torch.bool).view(-1).index_fill_(0, slots, True)
        weights_TK = weights_TK.masked_fill(~kept.view_as(weights_TK), 0)
    answers_NH.index_copy_(0, slots, answers)
    return torch.bmm(weights_TK[:, None], answers_NH.view(*weights_TK.shape, answers.shape[1]))[:, 0]


def _split_gate_up(hidden: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gate and up, views of the joint projection `[..., 2I]`."""
    if layout.startswith("interleaved"):
        return hidden[..., 0::2], hidden[..., 1::2]
    width = hidden.shape[-1] // 2
    return hidden[..., :width], hidden[..., width:]


def _experts_fake(
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
) -> Tensor:
    _check(x, experts, weights, gate_up, down, gate_up_bias, down_bias, activation, layout)
    return x.new_empty(x.shape)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up, down, gate_up_bias and down_bias, given that of y, each in its own dtype.

    Nothing of the forward is kept: the hidden state is computed again, and the gradient of a weight is
    `<down^T grad, hidden>`, so that the answers are not. All in the accumulation dtype. The last four are empty
    (`[0]`) if `weight_grads` is false, a bias's also if there is none.
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
        slots = sorted_slots[start:stop]
        tokens = slots.div(experts.shape[1], rounding_mode="floor")
        x_nH, grad_nH = x[tokens].to(acc), grad[tokens].to(acc)
        weight_n1 = weights.reshape(-1)[slots, None].to(acc)
        gate_up_e, down_e = gate_up[expert].to(acc), down[expert].to(acc)
        joint_n2I = x_nH @ gate_up_e.T
        if gate_up_bias is not None:
            joint_n2I = joint_n2I + gate_up_bias[expert].to(acc)
        gate_nI, up_nI = _split_gate_up(joint_n2I, layout)
        hidden_nI = activate(gate_nI, up_nI, activation, alpha, limit)

        grad_hidden_nI = grad_nH @ down_e
        grad_weights_N[slots] = (grad_hidden_nI * hidden_nI).sum(-1)
        if down_bias is not None:
            grad_weights_N[slots] += grad_nH @ down_bias[expert].to(acc)
        grad_gate_nI, grad_up_nI = activate_backward(
            grad_hidden_nI * weight_n1, gate_nI, up_nI, activation, alpha, limit
        )
        grad_joint_n2I = _join_gate_up(grad_gate_nI, grad_up_nI, layout)
        grad_x_NH[slots] = grad_joint_n2I @ gate_up_e
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


def _join_gate_up(gate: Tensor, up: Tensor, layout: str) -> Tensor:
    """`[..., 2I]`: the inverse of `_split_gate_up`."""
    if layout.startswith("interleaved"):
        return torch.stack((gate, up), dim=-1).flatten(-2)
    return torch.cat((gate, up), dim=-1)


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


_ARGUMENTS = (
    "Tensor x, Tensor experts, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias,"
    " str activation, float alpha, float limit, str layout"
)
register(f"experts({_ARGUMENTS}) -> Tensor", experts, _experts_fake)
register(
    f"experts_backward(Tensor grad, {_ARGUMENTS}, bool weight_grads)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    experts_backward,
    _experts_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.attributes = inputs[7:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    grads = torch.ops.dsmoe.experts_backward(grad, *ctx.saved_tensors, *ctx.attributes, any(needed[3:7]))
    inputs = (0, 2, 3, 4, 5, 6)
    by_input = {i: g if needed[i] else None for i, g in zip(inputs, grads, strict=True)}
    return tuple(by_input.get(i) for i in range(11))


register_autograd("experts", _backward, _save)
refuse_second_backward("experts_backward")
