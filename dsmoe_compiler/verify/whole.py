"""The packaged artifact end to end: keys, values, logits, routing, greedy tokens, and the same bits twice.

The keys and values of layer l at position t follow from what layer l - 1 handed over at t, so the cache shows where two
runs part. All runs follow eager's greedy tokens; ours and eager's are each judged against float64 with the experts that
they chose themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsmoe_compiler.verify.exact import Exact
from dsmoe_compiler.verify.layers import explain, judge_routing, numbers_of
from dsmoe_compiler.verify.result import Check
from dsmoe_compiler.verify.trace import Trace
from dsmoe_model.moe import MoE
from dsmoe_model.transformer import Transformer
from dsmoe_runtime.agreement import OWN_KERNELS, Allowance, routing_agreement, within_budget


def check_cache(
    ours: Sequence[Trace],
    eager: Sequence[Trace],
    exact: Sequence[Exact],
    exact_eager: Sequence[Exact],
    allowance: Allowance = OWN_KERNELS,
) -> Check:
    """Every cache row of every layer.

    Where a layer's keys and values are the first to be off, what the layer before handed over is accused; where only
    one of the two is off, or the row was never written, that layer's own attention.
    """
    places = _places(ours, first=0)
    numbers: dict[str, object] = {}
    problem, accused = "", None
    closest = 0.0
    for layer in range(len(ours[0].key)):
        verdicts = {
            part: within_budget(
                _rows([getattr(trace, part)[layer] for trace in ours]),
                eager=_rows([getattr(trace, part)[layer] for trace in eager]),
                exact=_rows([getattr(values, part)[layer] for values in exact]),
                exact_eager=_rows([getattr(values, part)[layer] for values in exact_eager]),
                factor=allowance.factor,
                level=allowance.level,
            )
            for part in ("key", "value")
        }
        numbers[f"layers.{layer}"] = {part: numbers_of(verdict) for part, verdict in verdicts.items()}
        bad = [part for part, verdict in verdicts.items() if not verdict.ok]
        closest = max([closest, *(verdict.worst / verdict.budget for verdict in verdicts.values() if verdict.budget)])
        if bad and accused is None:
            unwritten = _unwritten([trace.key[layer] for trace in ours], verdicts["key"].worst_row)
            accused = layer if len(bad) == 1 or unwritten or layer == 0 else layer - 1
            cause = f"layers.{layer}'s own attention" if accused == layer else f"what layers.{layer - 1} hands over"
            if unwritten:
                cause = "a slot that was never written"
            problem = f"layers.{layer} {' and '.join(bad)}: {explain(verdicts[bad[0]], places)}; points at {cause}"
    strays = sum(trace.strays for trace in ours)
    if strays:
        problem = "; ".join(filter(None, [problem, f"{strays} slots after the end of the sequence were written"]))
    return Check(
        name="keys and values",
        ok=not problem,
        detail=problem or f"{len(places)} rows in {len(ours[0].key)} layers, at most {closest:.2f} of the budget",
        numbers={**numbers, "strays": strays},
        layer=accused,
    )


def check_logits(
    ours: Sequence[Trace],
    eager: Sequence[Trace],
    exact: Sequence[Exact],
    exact_eager: Sequence[Exact],
    allowance: Allowance = OWN_KERNELS,
) -> Check:
    """Every row of next-token logits."""
    verdict = within_budget(
        _rows([trace.logits_BNV for trace in ours]),
        eager=_rows([trace.logits_BNV for trace in eager]),
        exact=_rows([values.logits_BNV for values in exact]),
        exact_eager=_rows([values.logits_BNV for values in exact_eager]),
        factor=allowance.factor,
        level=allowance.level,
    )
    last = len(ours[0].key) - 1
    return Check(
        name="logits",
        ok=verdict.ok,
        detail=explain(verdict, _places(ours, first=None)),
        numbers=numbers_of(verdict),
        layer=None if verdict.ok else last,
    )


def check_routing(
    model: Transformer,
    ours: Sequence[Trace],
    eager: Sequence[Trace],
    eager_scores: Sequence[Sequence[Tensor]],
    exact: Sequence[Exact],
    exact_eager: Sequence[Exact],
) -> Check:
    """The experts that the artifact reports: how often not eager's, and whether rounding excuses it."""
    places = _places(ours, first=0)
    layers = [(index, block.mlp) for index, block in enumerate(model.layers)]
    routers = [(index, layer.router) for index, layer in layers if isinstance(layer, MoE) and layer.router is not None]
    numbers: dict[str, object] = {}
    problem, accused, mismatches, widest = "", None, 0, 0.0
    for order, (index, router) in enumerate(routers):
        verdict = judge_routing(
            router,
            _rows([trace.experts[order] for trace in ours]),
            _rows([trace.experts[order] for trace in eager]),
            exact_TE=_rows([values.scores[order] for values in exact]),
            eager_TE=_rows([scores[order] for scores in eager_scores]),
            exact_eager_TE=_rows([values.scores[order] for values in exact_eager]),
        )
        numbers[f"layers.{index}"] = numbers_of(verdict)
        mismatches += verdict.mismatches
        widest = max(widest, verdict.widest_gap)
        if not verdict.ok and accused is None:
            accused, problem = index, f"layers.{index}: {verdict} (that is {places[verdict.worst_token or 0]})"
    tokens = len(places) * len(routers)
    counted = f"{mismatches} of {tokens} choices differ from eager's"
    if mismatches:
        counted += f", widest gap {widest:.1e}, all within rounding"
    return Check(
        "routing", not problem, problem or counted, {"mismatches": mismatches, "tokens": tokens, **numbers}, accused
    )


def check_greedy(
    ours: Sequence[Trace], eager: Sequence[Trace], exact: Sequence[Exact], exact_eager: Sequence[Exact]
) -> Check:
    """The greedy token of every step is eager's, or its exact logit is within rounding of the best one.

    A choice of experts that rounding excused may lead to another token: `exact` is then float64 with those experts.
    Where the choice has no excuse, pass `exact_eager` for both.
    """
    logits, logits_eager = _rows([t.logits_BNV for t in ours]), _rows([t.logits_BNV for t in eager])
    token_R, token_eager_R = logits.argmax(dim=-1), logits_eager.argmax(dim=-1)
    differ = (token_R != token_eager_R).nonzero().flatten().tolist()
    verdict = routing_agreement(
        token_R[:, None],
        token_eager_R[:, None],
        exact_TE=_rows([values.logits_BNV for values in exact]),
        eager_TE=logits_eager,
        exact_eager_TE=_rows([values.logits_BNV for values in exact_eager]),
    )
    detail = f"{len(token_R) - len(differ)} of {len(token_R)} tokens are eager's"
    if not verdict.ok:
        row = verdict.worst_token or 0
        detail += (
            f"; after {_places(ours, first=None)[row]} it says {int(token_R[row])}, eager {int(token_eager_R[row])}: "
            f"{verdict.gap:.2e} below the best logit, rounding excuses {verdict.rounding:.2e}"
        )
    elif differ:
        detail += f", {len(differ)} {'is a tie' if len(differ) == 1 else 'are ties'} within rounding"
    return Check("greedy tokens", verdict.ok, detail, {"ties": len(differ), **numbers_of(verdict)})


def check_repeat(first: Sequence[Trace], second: Sequence[Trace]) -> Check:
    """Equal to the bit: logits, experts and cache, the second time in a cache that another sequence had used."""
    differing = []
    for number, (one, two) in enumerate(zip(first, second, strict=True)):
        pairs = {"logits": ([one.logits_BNV], [two.logits_BNV]), "experts": (one.experts, two.experts)}
        pairs |= {"keys": (one.key, two.key), "values": (one.value, two.value)}
        for what, (left, right) in pairs.items():
            if not all(torch.equal(a, b) for a, b in zip(left, right, strict=True)):
                differing.append(f"{what} of sequence {number}")
    detail = (
        f"{', '.join(differing)} differ between two runs" if differing else f"{len(first)} sequences, the same bits"
    )
    return Check("repeat", not differing, detail, {"differing": differing})


def _unwritten(parts: Sequence[Tensor], row: int | None) -> bool:
    return row is not None and not _rows(parts)[row].any()


def _rows(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten(0, -2) for part in parts])


def _places(traces: Sequence[Trace], *, first: int | None) -> list[str]:
    """Names of the rows in `_rows` order; `first` None: from the last position of the prompt."""
    return [
        f"sequence {number}{f' of batch row {batch}' if trace.ids_BS.shape[0] > 1 else ''}, position {position}"
        for number, trace in enumerate(traces)
        for batch in range(trace.ids_BS.shape[0])
        for position in range(trace.prompt - 1 if first is None else first, trace.ids_BS.shape[1])
    ]
