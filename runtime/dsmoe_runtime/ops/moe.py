"""dsmoe::moe: a whole mixture-of-experts layer in one operator: gate, routed experts, shared experts.

T tokens, H hidden size, E experts, I expert width, S shared width, K experts per token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmoe_runtime.errors import ConfigError, InputError
from dsmoe_runtime.ops.activation import has_gate
from dsmoe_runtime.ops.cuda import register_cuda
from dsmoe_runtime.ops.experts import accumulation_dtype, check_alike, check_experts, run_experts
from dsmoe_runtime.ops.library import register, register_training
from dsmoe_runtime.ops.mlp import mlp
from dsmoe_runtime.ops.route import check_routing, route

ROUTER_DTYPES = ("float32", "activation")


def _check(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    gate: tuple[int, str, int, int, str],
    router_dtype: str,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    activation: str,
    layout: str,
    shared: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    check_experts(x, *weights, activation, layout)
    if router_dtype not in ROUTER_DTYPES:
        raise ConfigError(f"router_dtype is {router_dtype!r}; it must be one of {', '.join(ROUTER_DTYPES)}")
    hidden, num_experts = x.shape[1], weights[0].shape[0]
    if router_weight.shape != (num_experts, hidden):
        raise InputError(f"router_weight is {tuple(router_weight.shape)}; x and gate_up want {(num_experts, hidden)}")
    check_routing(num_experts, *gate)
    for name, bias in (("router_bias", router_bias), ("selection_bias", selection_bias)):
        if bias is not None and bias.shape != (num_experts,):
            raise InputError(f"{name} is {tuple(bias.shape)}; gate_up has {num_experts} experts")
    for name, weight in (
        ("router_weight", router_weight),
        ("router_bias", router_bias),
        ("selection_bias", selection_bias),
    ):
        if weight is not None and weight.device != x.device:
            raise InputError(f"{name} is on {weight.device}, x on {x.device}; move one")
    shared_gate_up, shared_down, shared_gate = shared
    if shared_gate_up is None or shared_down is None:
        if shared_gate_up is not shared_down or shared_gate is not None:
            raise InputError("shared_gate_up and shared_down go together, and shared_gate goes with them")
        return
    width, parts = shared_down.shape[-1], 2 if has_gate(layout) else 1
    if shared_down.shape != (hidden, width) or shared_gate_up.shape != (parts * width, hidden):
        raise InputError(
            f"shared_gate_up is {tuple(shared_gate_up.shape)} and shared_down {tuple(shared_down.shape)}; "
            f"x {tuple(x.shape)} and layout {layout!r} want [{'2S' if parts == 2 else 'S'}, {hidden}] and [{hidden}, S]"
        )
    if shared_gate is not None and shared_gate.shape != (1, hidden):
        raise InputError(f"shared_gate is {tuple(shared_gate.shape)}; x {tuple(x.shape)} wants {(1, hidden)}")
    check_alike(x, shared_gate_up=shared_gate_up, shared_down=shared_down, shared_gate=shared_gate)


def moe(
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
) -> tuple[Tensor, Tensor]:
    """The rule of dsmoe::moe: `route`, then `experts`, plus the shared experts (DeepSeekMoE, eq. 9-11, no residual).

    Args:
        x: `[T, H]`.
        router_weight, router_bias: `[E, H]`, and `[E]` added to the logits (gpt-oss), or None; any floating dtype.
        selection_bias: the `bias` of `route`.
        top_k ... scale: as in `route`.
        router_dtype: "float32": logits and scores in float32 (float64 for float64), whatever x is; "activation": in
            x's dtype, as v1's remote code has it.
        gate_up ... layout: as in `experts`.
        shared_gate_up, shared_down: `[2S, H]`, the gate's rows first, and `[H, S]`, or None; the experts' activation.
            With an ungated layout they have no gate either: `[S, H]`.
        shared_gate: `[1, H]` or None; the shared answer is multiplied by `sigmoid(x shared_gate^T)` (Qwen2-MoE).

    Returns `y [T, H]` in x's dtype and the `experts [T, K]` (int64) that made it.
    """
    _check(
        x,
        router_weight,
        router_bias,
        selection_bias,
        (top_k, score, n_group, topk_group, group_score),
        router_dtype,
        (gate_up, down, gate_up_bias, down_bias),
        activation,
        layout,
        (shared_gate_up, shared_down, shared_gate),
    )
    logits = router_logits(x, router_weight, router_bias, router_dtype)
    weights, experts = route(
        logits, selection_bias, top_k, score, n_group, topk_group, group_score, renormalize, eps, scale
    )
    y = run_experts(x, experts, weights, gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout)
    if shared_gate_up is not None and shared_down is not None:
        answer = mlp(
            x.contiguous(),
            shared_gate_up,
            shared_down,
            None,
            None,
            activation,
            alpha,
            limit,
            interleaved=False,
            gated=has_gate(layout),
        )
        if shared_gate is not None:
            answer = answer * F.linear(x, shared_gate).sigmoid()
        y = y + answer
    return y.to(x.dtype), experts


def shared_layout(layout: str) -> str:
    """How gate and up of the shared experts lie beside routed experts in `layout`: gate first, or there is none."""
    return "concat" if has_gate(layout) else "ungated"


def router_logits(x: Tensor, router_weight: Tensor, router_bias: Tensor | None, router_dtype: str) -> Tensor:
    """`[T, E]` in the router's dtype."""
    dtype = accumulation_dtype(x) if router_dtype == "float32" else x.dtype
    return F.linear(x.to(dtype), router_weight.to(dtype), None if router_bias is None else router_bias.to(dtype))


def moe_fake(
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
) -> tuple[Tensor, Tensor]:
    """`moe` without its numbers: what it refuses, and the shapes and dtypes of its results."""
    _check(
        x,
        router_weight,
        router_bias,
        selection_bias,
        (top_k, score, n_group, topk_group, group_score),
        router_dtype,
        (gate_up, down, gate_up_bias, down_bias),
        activation,
        layout,
        (shared_gate_up, shared_down, shared_gate),
    )
    return x.new_empty(x.shape), x.new_empty((x.shape[0], top_k), dtype=torch.int64)


ROUTED = (
    "Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias,"
    " str activation, float alpha, float limit, str layout"
)
SHARED = "Tensor? shared_gate_up, Tensor? shared_down, Tensor? shared_gate"
ARGUMENTS = (
    "Tensor x, Tensor router_weight, Tensor? router_bias, Tensor? selection_bias, int top_k, str score,"
    " int n_group, int topk_group, str group_score, bool renormalize, float eps, float scale, str router_dtype,"
    f" {ROUTED}, {SHARED}"
)
register(f"moe({ARGUMENTS}) -> (Tensor y, Tensor experts)", moe, moe_fake)

register_training("moe", "moe_training", outputs=2)


def _refusal(
    x: Tensor, weight: Tensor, bias: Tensor | None, selection_bias: Tensor | None, top_k: int, *_: Any
) -> str | None:
    from dsmoe_runtime.kernels.route import refusal

    return refusal(weight.shape[0], top_k, x, weight, bias, selection_bias)


def _check_inputs(*inputs: Any) -> None:
    """`_check` of all that the operator takes."""
    checked = (*inputs[:4], inputs[4:9], inputs[12], inputs[13:17], inputs[17], inputs[20], inputs[21:])
    _check(*checked)


register_cuda("moe", moe, _refusal, check=_check_inputs)
