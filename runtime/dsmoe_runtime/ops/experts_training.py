"""dsmoe::experts_training: `experts` in training; beside y it returns what the backward would compute again.

T tokens, H hidden size, E experts, I expert width, K experts per token, P = T K slots.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmoe_runtime.ops.cuda import register_cuda
from dsmoe_runtime.ops.experts import ARGUMENTS, check_call, check_inputs, dispatch, experts
from dsmoe_runtime.ops.library import register, register_autograd

Kept = tuple[Tensor, Tensor, Tensor]


def experts_training(
    x: Tensor,
    experts_TK: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rule of dsmoe::experts_training: y as `experts` has it, then joint, slots and offsets.

    joint `[P, 2I]`, ungated `[P, I]`, in x's dtype: gate and up before the activation, in the order of gate_up's rows;
    row r is that of slot `slots[r]` (`t * K + k`). slots `[P]` int32: sorted by expert, ascending within one, skipped
    slots left out, so the end of both is undefined. offsets `[E + 1]` int32: where each expert's slots start. On the
    CPU these three are empty: there joint costs less to compute again than to keep.
    """
    y = experts(x, experts_TK, weights, gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout)
    joint, slots, offsets = empty_kept(x, experts_TK, gate_up, layout)
    if len(slots):
        joint, slots, offsets = keep(x, experts_TK, gate_up, gate_up_bias, layout)
    return y, joint, slots, offsets


def empty_kept(x: Tensor, experts_TK: Tensor, gate_up: Tensor, layout: str) -> Kept:
    """joint, slots and offsets, not yet filled in; without rows on the CPU."""
    on_cpu = x.device.type == "cpu"
    rows = 0 if on_cpu else experts_TK.numel()
    slots = experts_TK.new_empty(rows, dtype=torch.int32)
    offsets = experts_TK.new_empty(0 if on_cpu else gate_up.shape[0] + 1, dtype=torch.int32)
    return x.new_empty((rows, gate_up.shape[2 if layout.endswith("_transposed") else 1])), slots, offsets


def keep(x: Tensor, experts_TK: Tensor, gate_up: Tensor, gate_up_bias: Tensor | None, layout: str) -> Kept:
    """joint, slots and offsets in plain torch, on any device."""
    if layout.endswith("_transposed"):
        gate_up = gate_up.mT
    num_experts, top_k = gate_up.shape[0], max(1, experts_TK.shape[1])
    slots, parts = dispatch(experts_TK, num_experts)
    joint = x.new_zeros((experts_TK.numel(), gate_up.shape[1]))
    counts = [0] * num_experts
    for expert, start, stop in parts:
        tokens = slots[start:stop].div(top_k, rounding_mode="floor")
        bias = None if gate_up_bias is None else gate_up_bias[expert]
        joint[start:stop] = F.linear(x.index_select(0, tokens), gate_up[expert], bias)
        counts[expert] = stop - start
    ends = torch.tensor([0, *counts], device=x.device).cumsum(0)
    return joint, F.pad(slots, (0, experts_TK.numel() - len(slots))).int(), ends.int()


def _experts_training_fake(
    x: Tensor,
    experts_TK: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_call(x, experts_TK, weights, gate_up, down, gate_up_bias, down_bias, activation, layout)
    return x.new_empty(x.shape), *empty_kept(x, experts_TK, gate_up, layout)


register(
    f"experts_training({ARGUMENTS}) -> (Tensor y, Tensor joint, Tensor slots, Tensor offsets)",
    experts_training,
    _experts_training_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    kept = output[1:]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # or zeros as large as joint would be made for it
    ctx.save_for_backward(*inputs[:7], *kept)
    ctx.attributes = inputs[7:]


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    needed, saved = ctx.needs_input_grad, ctx.saved_tensors
    grads = torch.ops.dsmoe.experts_backward(grad, *saved[:7], *ctx.attributes, any(needed[3:7]), *saved[7:])
    inputs = (0, 2, 3, 4, 5, 6)
    by_input = {i: g if needed[i] else None for i, g in zip(inputs, grads, strict=True)}
    return tuple(by_input.get(i) for i in range(11))


register_autograd("experts_training", _backward, _save)
register_cuda("experts_training", experts_training, check=check_inputs)
