"""Each fused layer against the oracle's, on what reached it in the eager model and on inputs with outputs about 1.

Letters: T tokens, H model width, E experts, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_compiler.verify.exact import possible_experts
from dsmoe_compiler.verify.result import Check
from dsmoe_compiler.verify.trace import Call
from dsmoe_model.moe import MoE
from dsmoe_model.router import HashRouter, Router, Routing
from dsmoe_runtime.agreement import Agreement, RoutingAgreement, routing_agreement, within_budget

SCALED_TOKENS = 63


@dataclass(frozen=True)
class FusedLayer:
    """A layer that was fused. `fused(x [T, H])` and `routed_only(x)` return `(y [T, H], experts [T, K])`.

    `routed_only` leaves out the shared experts, which would dilute a small error of the routed ones; None if `module`
    has none. Both read the packed weights that the artifact carries.
    """

    name: str
    module: MoE
    fused: Callable[[Tensor], tuple[Tensor, Tensor]]
    routed_only: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


@torch.no_grad()
def check_layer(layer: FusedLayer, calls: Sequence[Call], *, index: int, seed: int) -> Check:
    """Routing first, then values with routing fixed: of the whole layer, and of its routed experts alone.

    `calls` are what the eager model sent through `layer.module`, the layer at `index`.
    """
    module, exact_module = layer.module, copy.deepcopy(layer.module).double()
    assert module.router is not None
    assert module.experts is not None
    calls = [*calls, scaled_call(module, calls[0].x_TH, seed)]
    places = [f"row {row} of T = {call.x_TH.shape[0]}" for call in calls for row in range(call.x_TH.shape[0])]
    eager = joined(calls)
    ours_TH, experts_TK = _run(layer.fused, calls)
    exact_TH, exact_scores_TE = _exact(exact_module, eager, experts_TK)
    same = torch.equal(experts_TK, eager.routing.experts_TK)
    exact_eager_TH = exact_TH if same else _exact(exact_module, eager, eager.routing.experts_TK)[0]
    routing = judge_routing(
        module.router,
        experts_TK,
        eager.routing.experts_TK,
        exact_TE=exact_scores_TE,
        eager_TE=eager.routing.scores_TE,
    )
    values = {"layer": within_budget(ours_TH, eager=eager.y_TH, exact=exact_TH, exact_eager=exact_eager_TH)}
    if layer.routed_only is not None and exact_module.shared_experts is not None:
        ours_TH, alone_TK = _run(layer.routed_only, calls)
        shared_TH = exact_module.shared_experts(eager.x_TH.double())
        if not torch.equal(alone_TK, experts_TK):
            exact_TH = _exact(exact_module, eager, alone_TK)[0]
        values["routed experts"] = within_budget(
            ours_TH,
            eager=module.experts(eager.x_TH, eager.routing.weights_TK, eager.routing.experts_TK),
            exact=exact_TH - shared_TH,
            exact_eager=exact_eager_TH - shared_TH,
        )

    problems = [] if routing.ok else [f"routing: {routing} (that is {places[routing.worst_token or 0]})"]
    problems += [f"{part}: {explain(verdict, places)}" for part, verdict in values.items() if not verdict.ok]
    empty_TH = layer.fused(eager.x_TH[:0])[0]
    if empty_TH.shape != eager.x_TH[:0].shape:
        problems.append(f"no tokens in, {list(empty_TH.shape)} out")
    passed = ", ".join(f"{part} {verdict.worst:.1e} of {verdict.budget:.1e}" for part, verdict in values.items())
    numbers = {part.replace(" ", "_"): numbers_of(verdict) for part, verdict in values.items()}
    return Check(
        name=layer.name,
        ok=not problems,
        detail="; ".join(problems) or f"{passed}; {routing.mismatches} of {routing.tokens} tokens routed otherwise",
        numbers={**numbers, "routing": numbers_of(routing)},
        layer=index if problems else None,
    )


@torch.no_grad()
def scaled_call(module: MoE, like_TH: Tensor, seed: int) -> Call:
    """Random tokens, scaled until the root mean square of the layer's output is about 1, through the oracle."""
    assert module.router is not None
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SCALED_TOKENS, like_TH.shape[1], generator=generator).to(like_TH.device)
    vocabulary = module.router.config.vocab_size
    token_ids_T = torch.randint(vocabulary, (SCALED_TOKENS,), generator=generator).to(like_TH.device)
    for _ in range(3):
        x_TH = x.to(like_TH.dtype)
        y_BTH, routing = module(x_TH[None], token_ids_T)
        size = float(y_BTH.double().square().mean().sqrt())
        if 0.3 <= size <= 3 or size != size:
            break
        x = x * min(max((size or 1e-9) ** -0.5, 1 / 16), 16)  # a gated unit's output grows with the square of its input
    return Call(x_TH, token_ids_T, y_BTH[0], routing)


def judge_routing(
    router: Router | HashRouter,
    actual_TK: Tensor,
    eager_TK: Tensor,
    *,
    exact_TE: Tensor,
    eager_TE: Tensor,
    exact_eager_TE: Tensor | None = None,
) -> RoutingAgreement:
    """`routing_agreement` on the scores that `router` selects by: with its bias, under its group limit."""
    bias = router.e_score_correction_bias if isinstance(router, Router) else None
    config = router.config

    def selection(scores_TE: Tensor) -> Tensor:
        return scores_TE if bias is None else scores_TE + bias

    return routing_agreement(
        actual_TK,
        eager_TK,
        exact_TE=selection(exact_TE),
        eager_TE=selection(eager_TE),
        exact_eager_TE=None if exact_eager_TE is None else selection(exact_eager_TE),
        n_group=config.n_group,
        topk_group=config.topk_group,
        group_score=config.group_score,
    )


def explain(verdict: Agreement, places: Sequence[str]) -> str:
    """A verdict with its row named by place."""
    place = places[verdict.worst_row] if verdict.worst_row is not None else "nothing"
    text = f"{place} is off by {verdict.worst:.2e}, budget {verdict.budget:.2e}"
    return text if verdict.ok else f"{text}; {verdict.rows_over} of {verdict.rows} rows are over"


def numbers_of(verdict: Agreement | RoutingAgreement) -> dict[str, object]:
    """A verdict's fields as plain values; NaN and Inf, which JSON has no words for, as text."""
    return {
        name: value if not isinstance(value, float) or abs(value) < float("inf") else str(value)
        for name, value in vars(verdict).items()
    }


def joined(calls: Sequence[Call]) -> Call:
    """The rows of all calls as those of one."""
    return Call(
        x_TH=torch.cat([call.x_TH for call in calls]),
        token_ids_T=torch.cat([call.token_ids_T for call in calls]),
        y_TH=torch.cat([call.y_TH for call in calls]),
        routing=Routing(*(torch.cat(parts) for parts in zip(*(call.routing for call in calls), strict=True))),
    )


def _run(fused: Callable[[Tensor], tuple[Tensor, Tensor]], calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    """`(y, experts)` of all rows, each call by itself: its number of tokens may choose another way through."""
    outputs = [fused(call.x_TH) for call in calls]
    return torch.cat([y_TH for y_TH, _ in outputs]), torch.cat([experts_TK for _, experts_TK in outputs])


def _exact(exact_module: MoE, call: Call, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
    """`(y, scores)` in float64 with the experts given."""
    assert exact_module.experts is not None
    possible_TK = possible_experts(experts_TK, exact_module.experts.n_routed_experts)
    y_BTH, routing = exact_module(call.x_TH.double()[None], call.token_ids_T, possible_TK)
    return y_BTH[0], routing.scores_TE
