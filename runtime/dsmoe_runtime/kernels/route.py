"""dsmoe::route on the GPU, and the gate in front of it: from tokens or logits to experts and weights.

`route` is one launch. `gate` is one where a program can read the router's weight by itself, or where there are tokens
enough for all programs; otherwise two: parts of the product over H, then `route`'s kernel, which adds them up in order.
Nothing is counted or waited for across programs, so that both may be replayed on any number of streams.

T tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dsmoe_runtime.kernels.device.gate import gate_kernel, gate_parts_kernel
from dsmoe_runtime.kernels.device.route import route_kernel
from dsmoe_runtime.kernels.launch import chained, launch, upcast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_EXPERTS = 512
MOST_CHOSEN = 16
ONE_PROGRAM = 128 * 1024  # bytes of router weight from which on a program does not read them all alone
PART = 32 * 1024  # bytes of router weight that a program reads when they are split
FEW_TOKENS, MANY_TOKENS = 128, 2048


@dataclass(frozen=True)
class GateCut:
    """How the product is cut: tokens a program, depth a step, parts of H (`span` columns each), warps and stages."""

    block_t: int
    block_h: int
    parts: int
    span: int
    num_warps: int
    num_stages: int


def refusal(num_experts: int, top_k: int, *tensors: Tensor | None) -> str | None:
    """Why these kernels cannot do what the torch rule does, or None; `tensors` are all the inputs."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"a tensor is {tensor.dtype}; the router's kernels take float32, bfloat16 and float16"
    if num_experts > MOST_EXPERTS:
        return f"{num_experts} experts; the router's kernels take at most {MOST_EXPERTS}"
    if top_k > MOST_CHOSEN:
        return f"top_k is {top_k}; the router's kernels take at most {MOST_CHOSEN}"
    return None


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
    """`ops.route.route` in one launch: `weights [T, K]` (float32) and `experts [T, K]` (int64).

    Scores, their sum with the bias, groups' scores and weights are computed in float32 and rounded to the logits' dtype
    (to the promoted one with a bias) wherever the rule's torch operation rounds; float32 is not rounded again. So
    bfloat16 and float16 differ from the rule only where the float32 under them straddle a rounding boundary.
    """
    tokens, num_experts = logits.shape
    reason = refusal(num_experts, top_k, logits, bias)
    assert reason is None, reason
    weights, experts = _outputs(logits, tokens, top_k)
    if tokens:
        _select(
            logits.contiguous(),
            None,
            bias,
            weights,
            experts,
            _meta(num_experts, top_k, score, n_group, topk_group, group_score, renormalize),
            (eps, scale),
            dtype=logits.dtype,
            parts=1,
        )
    return weights, experts


def gate(
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
) -> tuple[Tensor, Tensor]:
    """`ops.moe.router_logits` of `x [T, H]` and `route` of them, without logits in between where one launch does.

    The product is accurate to float32 whatever the dtypes: no operand is rounded but to x's dtype for "activation".
    """
    tokens, hidden = x.shape
    num_experts = router_weight.shape[0]
    reason = refusal(num_experts, top_k, x, router_weight, router_bias, selection_bias)
    assert reason is None, reason
    weights, experts = _outputs(x, tokens, top_k)
    if tokens == 0:
        return weights, experts
    x, router_weight = x.contiguous(), router_weight.contiguous()
    activation = router_dtype == "activation"
    meta = _meta(num_experts, top_k, score, n_group, topk_group, group_score, renormalize)
    columns = meta["PADDED_GROUPS"] * meta["PADDED_MEMBERS"]
    wide = (not activation and x.dtype != router_weight.dtype) or x.dtype == torch.float32
    cut = gate_cut(tokens, hidden, num_experts, columns, router_weight.element_size(), wide)
    blocks = triton.cdiv(tokens, cut.block_t)
    pdl = chained(x.device)
    shared: dict[str, Any] = {
        "H": hidden,
        "ACTIVATION": activation,
        "SPAN": cut.span,
        "BLOCK_T": cut.block_t,
        "BLOCK_H": cut.block_h,
        "UP": upcast(x.dtype) or upcast(router_weight.dtype),
        "PDL": pdl,
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
    }
    if cut.parts == 1:
        launch(
            gate_kernel,
            (blocks,),
            *(x, router_weight, x if router_bias is None else router_bias),
            *(x if selection_bias is None else selection_bias, weights, experts, tokens, eps, scale),
            pdl=pdl,
            **meta,
            **shared,
            ROUTER_BIASED=router_bias is not None,
            BIASED=selection_bias is not None,
        )
        return weights, experts
    parts = x.new_empty((cut.parts, tokens, num_experts), dtype=torch.float32)
    launch(
        gate_parts_kernel,
        (blocks, cut.parts),
        *(x, router_weight, parts, tokens),
        pdl=pdl,
        E=num_experts,
        COLUMNS=max(16, triton.next_power_of_2(num_experts)),
        **shared,
    )
    dtype = x.dtype if activation else torch.float32
    _select(parts, router_bias, selection_bias, weights, experts, meta, (eps, scale), dtype=dtype, parts=cut.parts)
    return weights, experts


def gate_cut(tokens: int, hidden: int, num_experts: int, columns: int, item: int, wide: bool) -> GateCut:
    """The cut by sizes alone. `wide`: operands are multiplied as float32, or one is split in three.

    A program reads the router's weight at 100 to 200 GB/s, and all of them must read all of it once a block of tokens.
    """
    depth = 128 if columns <= 64 else 64 if columns <= 256 else 32
    if wide:
        depth //= 2
    block_h = max(16, min(depth, triton.next_power_of_2(hidden)))
    steps = triton.cdiv(hidden, block_h)
    size = num_experts * hidden * item
    few = tokens <= FEW_TOKENS
    most = 1 if size < ONE_PROGRAM or tokens > MANY_TOKENS else 32 if few else 8
    span = triton.cdiv(steps, min(most, max(1, size // PART), steps)) * block_h
    parts = triton.cdiv(hidden, span)
    if parts > 1:
        block_t = 16 if few else 64
    else:
        block_t = 16 if tokens <= MANY_TOKENS else 32 if tokens <= 2 * MANY_TOKENS and columns <= 128 else 64
    if columns > 256 or wide:  # registers: two float32 tiles of block_t x columns
        block_t = min(block_t, 32 if columns <= 512 else 16)
    warps = 4 if columns <= 64 and block_t <= 32 else 8
    return GateCut(block_t, block_h, parts, span, warps, 3 if wide else 4)


def _columns(num_experts: int, n_group: int, topk_group: int) -> dict[str, int]:
    """Groups that restrict nothing are one group; a `tl.dot` wants 16 columns."""
    groups = n_group if topk_group < n_group else 1
    padded = triton.next_power_of_2(groups)
    members = max(triton.next_power_of_2(num_experts // groups), 16 // padded)
    return {"GROUPS": groups, "PADDED_GROUPS": padded, "PADDED_MEMBERS": members}


def _meta(
    num_experts: int, top_k: int, score: str, n_group: int, topk_group: int, group_score: str, renormalize: bool
) -> dict[str, Any]:
    columns = _columns(num_experts, n_group, topk_group)
    return {
        **columns,
        "E": num_experts,
        "K": top_k,
        "PADDED_K": triton.next_power_of_2(top_k),
        "TOPK_GROUP": min(topk_group, columns["GROUPS"]),
        "TOP2": group_score == "top2",
        "SCORE": score,
        "RENORMALIZE": renormalize,
    }


def _outputs(like: Tensor, tokens: int, top_k: int) -> tuple[Tensor, Tensor]:
    weights = like.new_empty((tokens, top_k), dtype=torch.float32)
    return weights, like.new_empty((tokens, top_k), dtype=torch.int64)


def _select(
    logits: Tensor,
    router_bias: Tensor | None,
    bias: Tensor | None,
    weights: Tensor,
    experts: Tensor,
    meta: dict[str, Any],
    scalars: tuple[float, float],
    *,
    dtype: torch.dtype,
    parts: int,
) -> None:
    """Launch `route_kernel` on `[parts, T, E]`."""
    tokens = weights.shape[0]
    block_t = tokens_a_program(tokens, parts)
    pdl = chained(logits.device)
    launch(
        route_kernel,
        (triton.cdiv(tokens, block_t),),
        *(logits, logits if router_bias is None else router_bias, logits if bias is None else bias),
        *(weights, experts, tokens, *scalars),
        pdl=pdl,
        **meta,
        ROUTER_BIASED=router_bias is not None,
        BIASED=bias is not None,
        DTYPE=str(dtype).removeprefix("torch."),
        PARTS=parts,
        PADDED_PARTS=triton.next_power_of_2(parts),
        BLOCK_T=block_t,
        PDL=pdl,
        num_warps=4 if parts > 1 else block_t,
    )


def tokens_a_program(tokens: int, parts: int) -> int:
    """Of `route_kernel`: a warp a token, so that maxima stay within warps; four warps where they add up parts."""
    return 4 if parts == 1 and tokens > 1024 else 1
