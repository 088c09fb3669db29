"""dsmoe::moe_training: `moe` in training; beside its results it returns what the backward would compute again.

T tokens, H hidden size, E experts, I expert width, S shared width, K experts per token, P = T K slots.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmoe_runtime.ops.activation import activate, halves
from dsmoe_runtime.ops.experts_training import empty_kept
from dsmoe_runtime.ops.library import register, register_autograd
from dsmoe_runtime.ops.moe import ARGUMENTS, moe_fake, router_logits, shared_layout


def moe_training(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rule of dsmoe::moe_training: y and experts as `moe` has them, then what the backward wants.

    joint, slots, offsets: of the routed experts, as in `experts_training`. shared_joint `[T, 2S]`, ungated `[T, S]`:
    gate and up of the shared experts, or `[0]` without any. On the CPU these four are empty, as there; elsewhere the
    layer is `composed`.
    """
    gate = (top_k, score, n_group, topk_group, group_score, renormalize, eps, scale)
    routed = (gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout)
    shared = (shared_gate_up, shared_down, shared_gate)
    router = (router_weight, router_bias, selection_bias)
    if x.device.type != "cpu":
        return composed(x, *router, gate, router_dtype, routed, shared)
    y, experts = torch.ops.dsmoe.moe(x, *router, *gate, router_dtype, *routed, *shared)
    return y, experts, *empty_kept(x, experts, gate_up, layout), x.new_empty(0)


def composed(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    gate: tuple[Any, ...],
    router_dtype: str,
    routed: tuple[Any, ...],
    shared: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The layer out of `route`, `experts_training` and torch's products: each answer is rounded before their sum."""
    logits = router_logits(x, router_weight, router_bias, router_dtype)
    weights, experts = torch.ops.dsmoe.route(logits, selection_bias, *gate)
    y, joint, slots, offsets = torch.ops.dsmoe.experts_training(x, experts, weights, *routed)
    shared_joint = x.new_empty(0)
    shared_gate_up, shared_down, shared_gate = shared
    if shared_gate_up is not None and shared_down is not None:
        shared_joint = F.linear(x, shared_gate_up)
        gate_TS, up_TS = halves(shared_joint, shared_layout(routed[7]))
        answer = F.linear(activate(gate_TS, up_TS, *routed[4:7]), shared_down)
        if shared_gate is not None:
            answer = answer * F.linear(x, shared_gate).sigmoid()
        y = y + answer
    return y, experts, joint, slots, offsets, shared_joint


def _moe_training_fake(*inputs: Any) -> tuple[Tensor, ...]:
    y, experts = moe_fake(*inputs)
    x, gate_up, layout, shared_gate_up = inputs[0], inputs[13], inputs[20], inputs[21]
    kept = x.device.type != "cpu" and shared_gate_up is not None
    shared_joint = x.new_empty((x.shape[0], shared_gate_up.shape[0]) if kept else 0)
    return y, experts, *empty_kept(x, experts, gate_up, layout), shared_joint


register(
    f"moe_training({ARGUMENTS}) -> (Tensor y, Tensor experts, Tensor joint, Tensor slots, Tensor offsets,"
    " Tensor shared_joint)",
    moe_training,
    _moe_training_fake,
)

_INPUTS = 24
_TENSORS = (0, 1, 2, 13, 14, 15, 16, 21, 22, 23)  # the inputs with a gradient, as moe_backward returns them


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros as large as joint would be made for it
    ctx.save_for_backward(*output[1:], *(inputs[i] for i in _TENSORS))
    _, _, _, _, _, ctx.score, _, _, _, *ctx.gate = inputs[:13]
    ctx.attributes = inputs[17:21]


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * _INPUTS
    experts, joint, slots, offsets, shared_joint, x, router_weight, router_bias, *weights = ctx.saved_tensors
    routed, shared = weights[:4], weights[4:]
    needed = ctx.needs_input_grad
    grads = torch.ops.dsmoe.moe_backward(
        *(grad, x, experts, router_weight, router_bias, ctx.score, *ctx.gate, *routed, *ctx.attributes, *shared),
        *(any(needed[13:17]), joint, slots, offsets, shared_joint),
    )
    by_input = {i: g if needed[i] else None for i, g in zip(_TENSORS, grads, strict=True)}
    return tuple(by_input.get(i) for i in range(_INPUTS))


register_autograd("moe_training", _backward, _save)
