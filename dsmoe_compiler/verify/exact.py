"""The float64 reference, one block at a time: exact values for given experts without a float64 copy of the model.

A skeleton of the model stands on the meta device. Each of its parts (embedding, norm, attention, feed-forward, head)
takes the weights in float64 just before it runs and drops them just after, so that one part exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsmoe_compiler.verify.trace import Trace, cache_rows
from dsmoe_model.attention import KVCache
from dsmoe_model.transformer import Transformer


@dataclass(frozen=True)
class Exact:
    """The float64 values of one `Trace`, with the experts that it chose."""

    logits_BNV: Tensor
    scores: list[Tensor]  # un-biased, [B, S, E] per layer that routes
    key: list[Tensor]  # [B, S, W] per layer
    value: list[Tensor]


def float64_model(model: Transformer) -> Transformer:
    """`model` in float64, borrowing its weights part by part while it runs."""
    with torch.device("meta"):
        skeleton = Transformer(model.config).double().eval()
    parts = [
        (skeleton.embed_tokens, model.embed_tokens),
        (skeleton.norm, model.norm),
        (skeleton.lm_head, model.lm_head),
    ]
    for block64, block in zip(skeleton.layers, model.layers, strict=True):
        parts += zip(block64.children(), block.children(), strict=True)
    for part64, part in parts:
        part64.register_forward_pre_hook(_borrow(part))
        part64.register_forward_hook(_give_back)
    return skeleton


def _borrow(part: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(part64: nn.Module, _args: tuple[Tensor, ...]) -> None:
        state = {
            name: value.double() if value.is_floating_point() else value for name, value in part.state_dict().items()
        }
        part64.load_state_dict(state, assign=True)

    return hook


def _give_back(part64: nn.Module, _args: tuple[Tensor, ...], _output: object) -> None:
    part64.to("meta")


@torch.no_grad()
def exact_values(model: Transformer, traces: Sequence[Trace]) -> list[Exact]:
    """Float64 values of all traces in one pass over the model: each a row of a batch, padded on the right.

    Padding on the right is never attended to by what stands left of it.
    """
    config, device = model.config, model.embed_tokens.weight.device
    longest = max(trace.ids_BS.shape[1] for trace in traces)
    ids_RS = torch.cat([_padded(trace.ids_BS, longest) for trace in traces])
    forced = [
        possible_experts(
            torch.cat([_padded(trace.experts[layer], longest) for trace in traces]).flatten(0, 1),
            config.n_routed_experts,
        )
        for layer in range(len(traces[0].experts))
    ]
    cache = KVCache.zeros(config, ids_RS.shape[0], longest, torch.float64, device)
    output = float64_model(model)(ids_RS, cache, experts=forced)
    scores = [routing.scores_TE.unflatten(0, ids_RS.shape) for routing in output.routing]
    exact, row = [], 0
    for trace in traces:
        rows, end = slice(row, row + trace.ids_BS.shape[0]), trace.ids_BS.shape[1]
        row = rows.stop
        exact.append(
            Exact(
                logits_BNV=output.logits_BSV[rows, trace.prompt - 1 : end],
                scores=[layer[rows, :end] for layer in scores],
                key=[cache_rows(layer[rows], end) for layer in cache.key],
                value=[cache_rows(layer[rows], end) for layer in cache.value],
            )
        )
    return exact


def _padded(values_BS: Tensor, length: int) -> Tensor:
    missing = length - values_BS.shape[1]
    return torch.cat((values_BS, values_BS[:, -1:].expand(-1, missing, *values_BS.shape[2:])), dim=1)


def possible_experts(experts_TK: Tensor, n_experts: int) -> Tensor:
    """`experts_TK`, with the first K for tokens whose experts no router could have chosen: repeated, or outside [0, E).

    Such a choice has no exact value. The routing check names it.
    """
    sorted_TK = experts_TK.sort(dim=-1).values
    inside_T = (sorted_TK[:, 0] >= 0) & (sorted_TK[:, -1] < n_experts)
    possible_T = inside_T & (sorted_TK[:, 1:] != sorted_TK[:, :-1]).all(dim=-1)
    first_K = torch.arange(experts_TK.shape[1], device=experts_TK.device)
    return torch.where(possible_T[:, None], experts_TK, first_K)
