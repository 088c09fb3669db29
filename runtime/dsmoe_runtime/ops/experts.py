"""dsmoe::experts: the routed experts of a layer, from dispatch to the weighted sum of their answers.

T tokens, H hidden size, E experts, I expert width, K experts per token, N = T K slots, A = the accumulation dtype.
"""

from typing import Any

import torch
from torch import Tensor

from dsmoe_runtime.errors import ConfigError, InputError
from dsmoe_runtime.ops.activation import check_activation, has_gate
from dsmoe_runtime.ops.cuda import register_cuda
from dsmoe_runtime.ops.library import register, register_training
from dsmoe_runtime.ops.mlp import mlp

LAYOUTS = (
    "concat", "interleaved", "concat_transposed", "interleaved_transposed", "ungated", "ungated_transposed",
)  # fmt: skip


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
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    check_activation(activation, layout)
    if x.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3:
        raise InputError(
            f"x, gate_up and down must have 2, 3 and 3 dimensions, not {x.dim()}, {gate_up.dim()}, {down.dim()}"
        )
    hidden, (num_experts, rows, columns) = x.shape[1], gate_up.shape
    transposed = layout.endswith("_transposed")
    parts = 2 if has_gate(layout) else 1
    width = (columns if transposed else rows) // parts
    wanted = (num_experts, hidden, parts * width) if transposed else (num_experts, parts * width, hidden)
    if gate_up.shape != wanted:
        raise InputError(f"gate_up is {tuple(gate_up.shape)}; x {tuple(x.shape)} and layout {layout!r} want {wanted}")
    wanted = (num_experts, width, hidden) if transposed else (num_experts, hidden, width)
    if down.shape != wanted:
        raise InputError(
            f"down is {tuple(down.shape)}; gate_up {tuple(gate_up.shape)} and layout {layout!r} want {wanted}"
        )
    if gate_up_bias is not None and gate_up_bias.shape != (num_experts, parts * width):
        raise InputError(
            f"gate_up_bias is {tuple(gate_up_bias.shape)}; "
            f"gate_up and layout {layout!r} want {(num_experts, parts * width)}"
        )
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


def check_call(
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
    """`check_experts`, and the same for the experts and weights of each token."""
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
            ones; "ungated" `[E, I, H]`, no gate: the hidden state is the activation of the one projection;
            "concat_transposed", "interleaved_transposed", "ungated_transposed" `[E, H, 2I]` or `[E, H, I]`, the same
            on columns.
        down: `[E, H, I]`, or `[E, I, H]` for the transposed layouts.
        gate_up_bias, down_bias: `[E, 2I]` or `[E, I]`, in the order of gate_up's rows, and `[E, H]`, or None.
        activation, alpha, limit: see `dsmoe_runtime.ops.activation`.

    Returns `[T, H]` in x's dtype, never a view of an input. Slots are summed in float32 (float64 for float64), each
    token's in the order of k: the same input gives the same bits on every run.
    """
    check_call(x, experts, weights, gate_up, down, gate_up_bias, down_bias, activation, layout)
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
            interleaved=layout.startswith("interleaved"),
            gated=has_gate(layout),
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
        kept = torch.zeros(weights_TK.numel(), dtype=torch.bool, device=slots.device).index_fill_(0, slots, True)
        weights_TK = weights_TK.masked_fill(~kept.view_as(weights_TK), 0)
    answers_NH.index_copy_(0, slots, answers)
    return torch.bmm(weights_TK[:, None], answers_NH.view(*weights_TK.shape, answers.shape[1]))[:, 0]


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
    check_call(x, experts, weights, gate_up, down, gate_up_bias, down_bias, activation, layout)
    return x.new_empty(x.shape)


ARGUMENTS = (
    "Tensor x, Tensor experts, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias,"
    " str activation, float alpha, float limit, str layout"
)
register(f"experts({ARGUMENTS}) -> Tensor", experts, _experts_fake)
register_training("experts", "experts_training", outputs=1)


def check_inputs(*inputs: Any) -> None:
    """`check_call` of all that the operator takes: alpha and limit, the ninth and tenth, may be anything."""
    checked = (*inputs[:8], inputs[10])
    check_call(*checked)


register_cuda("experts", experts, check=check_inputs)
