"""dsmoe::route: from router logits to the experts of each token and the weight of each.

T tokens, E experts, K experts per token, G groups of M experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmoe_runtime.errors import ConfigError, InputError
from dsmoe_runtime.ops.cuda import register_cuda
from dsmoe_runtime.ops.library import refuse_second_backward, register, register_autograd

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk")
GROUP_SCORES = ("max", "top2")


def check_routing(num_experts: int, top_k: int, score: str, n_group: int, topk_group: int, group_score: str) -> None:
    """Refuse a gate that cannot be, with both values."""
    if score not in SCORES:
        raise ConfigError(f"score is {score!r}; it must be one of {', '.join(SCORES)}")
    if group_score not in GROUP_SCORES:
        raise ConfigError(f"group_score is {group_score!r}; it must be one of {', '.join(GROUP_SCORES)}")
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k is {top_k} with {num_experts} experts; it must be in [1, {num_experts}]")
    if n_group < 1 or num_experts % n_group:
        raise ConfigError(f"n_group is {n_group} with {num_experts} experts; it must divide them")
    if not 1 <= topk_group <= n_group:
        raise ConfigError(f"topk_group is {topk_group} with n_group {n_group}; it must be in [1, {n_group}]")
    if n_group > 1 and group_score == "top2" and num_experts // n_group < 2:
        raise ConfigError(
            f"group_score 'top2' needs 2 experts a group; n_group is {n_group} with {num_experts} experts"
        )


def _check(
    logits: Tensor, bias: Tensor | None, top_k: int, score: str, n_group: int, topk_group: int, group_score: str
) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise InputError(f"logits must be a floating-point [T, E], not {logits.dtype} {tuple(logits.shape)}")
    num_experts = logits.shape[1]
    check_routing(num_experts, top_k, score, n_group, topk_group, group_score)
    if bias is not None and (bias.shape != (num_experts,) or bias.device != logits.device):
        raise InputError(
            f"bias is {tuple(bias.shape)} on {bias.device}; the logits want [{num_experts}] on {logits.device}"
        )


def first_largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, in order; of equals the lowest index first (not so torch.topk)."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    renormalize: bool,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The rule of dsmoe::route: `weights [T, K]` (float32, float64 from float64) and `experts [T, K]` (int64).

    Args:
        logits: `[T, E]`. Scores are computed in its dtype: pass float32, or bfloat16 for v1's gate to the bit.
        bias: `[E]` or None; added to the scores that select, never to those that weigh (DeepSeek-V3, eq. 16).
        score: softmax | sigmoid | sqrtsoftplus, or softmax_after_topk: select by logit, softmax over the K selected.
        n_group, topk_group: only experts of the `topk_group` best of `n_group` equal groups can be selected, where a
            group scores as its best expert ("max", DeepSeek-V2) or the sum of its best two ("top2", V3). If fewer
            than K experts survive, the rest come from the other groups, lowest index first.
        renormalize: divide the weights by their sum + `eps`; then they are multiplied by `scale` in any case.

    A token's experts are ordered by falling score, equals by rising index. They are distinct and in `[0, E)` whatever
    the logits hold; NaN counts as the largest, so that it reaches the weights of its own token.
    """
    _check(logits, bias, top_k, score, n_group, topk_group, group_score)
    scores_TE = _scores(logits, score)
    selection_TE = scores_TE if bias is None else scores_TE + bias
    if topk_group < n_group:
        selection_TGM = selection_TE.unflatten(1, (n_group, -1))
        groups_TG = selection_TGM.topk(1 if group_score == "max" else 2, dim=-1).values.sum(-1)
        dropped_TG = torch.ones_like(groups_TG, dtype=torch.bool)
        dropped_TG.scatter_(1, first_largest(groups_TG, topk_group), False)
        selection_TE = selection_TGM.masked_fill(dropped_TG[..., None], -torch.inf).flatten(1)
    experts_TK = first_largest(selection_TE, top_k).contiguous()
    weights_TK = _weigh(scores_TE, experts_TK, score, renormalize, eps, scale)
    return weights_TK.to(torch.promote_types(logits.dtype, torch.float32)), experts_TK


def weights_of(logits: Tensor, experts: Tensor, score: str, renormalize: bool, eps: float, scale: float) -> Tensor:
    """The weights that `route` gives to these `experts [T, K]`, however they were selected."""
    weights_TK = _weigh(_scores(logits, score), experts, score, renormalize, eps, scale)
    return weights_TK.to(torch.promote_types(logits.dtype, torch.float32))


def _weigh(scores_TE: Tensor, experts_TK: Tensor, score: str, renormalize: bool, eps: float, scale: float) -> Tensor:
    weights_TK = scores_TE.gather(1, experts_TK)
    if score == "softmax_after_topk":
        weights_TK = weights_TK.softmax(-1)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + eps)
    return weights_TK if scale == 1.0 else weights_TK * scale


def _scores(logits: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return logits.softmax(-1)
    if score == "sigmoid":
        return logits.sigmoid()
    if score == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return logits


def _route_fake(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    renormalize: bool,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check(logits, bias, top_k, score, n_group, topk_group, group_score)
    shape = (logits.shape[0], top_k)
    weights = logits.new_empty(shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return weights, logits.new_empty(shape, dtype=torch.int64)


def route_backward(
    grad_weights: Tensor, logits: Tensor, experts: Tensor, score: str, renormalize: bool, eps: float, scale: float
) -> Tensor:
    """Gradient `[T, E]` of the logits for fixed `experts [T, K]`: a selection has none, the selected scores do."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    scores_TE = _scores(logits.to(acc), score)
    p_TK = scores_TE.gather(1, experts)
    if score == "softmax_after_topk":
        p_TK = p_TK.softmax(-1)
    grad_TK = grad_weights.to(acc) * scale
    if renormalize:  # w = p / (sum p + eps)
        total_T1 = p_TK.sum(-1, keepdim=True) + eps
        grad_TK = (grad_TK - (grad_TK * p_TK).sum(-1, keepdim=True) / total_T1) / total_T1
    if score == "sigmoid":
        grad_TK = grad_TK * p_TK * (1 - p_TK)
    elif score == "sqrtsoftplus":  # d sqrt(softplus(l)) = sigmoid(l) / (2 p), which tends to 0 with p
        sigmoid_TK = logits.to(acc).gather(1, experts).sigmoid()
        grad_TK = torch.where(p_TK > 0, grad_TK * sigmoid_TK / (2 * p_TK), 0.0)
    elif score == "softmax_after_topk":
        grad_TK = p_TK * (grad_TK - (grad_TK * p_TK).sum(-1, keepdim=True))
    grad_TE = torch.zeros_like(scores_TE, memory_format=torch.contiguous_format).scatter_(1, experts, grad_TK)
    if score == "softmax":
        grad_TE = scores_TE * (grad_TE - (grad_TE * scores_TE).sum(-1, keepdim=True))
    return grad_TE.to(logits.dtype)


def _route_backward_fake(
    grad_weights: Tensor, logits: Tensor, experts: Tensor, score: str, renormalize: bool, eps: float, scale: float
) -> Tensor:
    return logits.new_empty(logits.shape)


register(
    "route(Tensor logits, Tensor? bias, int top_k, str score, int n_group, int topk_group, str group_score,"
    " bool renormalize, float eps, float scale) -> (Tensor weights, Tensor experts)",
    route,
    _route_fake,
)
register(
    "route_backward(Tensor grad_weights, Tensor logits, Tensor experts, str score, bool renormalize, float eps,"
    " float scale) -> Tensor",
    route_backward,
    _route_backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, ctx.score, _, _, _, ctx.renormalize, ctx.eps, ctx.scale = inputs
    ctx.save_for_backward(logits, output[1])


def _backward(ctx: Any, grad_weights: Tensor, grad_experts: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, experts = ctx.saved_tensors
    grad_logits = torch.ops.dsmoe.route_backward(
        grad_weights, logits, experts, ctx.score, ctx.renormalize, ctx.eps, ctx.scale
    )
    return grad_logits, *(None,) * 9


register_autograd("route", _backward, _save)
refuse_second_backward("route_backward")


def _refusal(logits: Tensor, bias: Tensor | None, top_k: int, *_: Any) -> str | None:
    from dsmoe_runtime.kernels.route import refusal

    return refusal(logits.shape[1], top_k, logits, bias)


register_cuda("route", route, _refusal, check=lambda *inputs: _check(*inputs[:7]))
