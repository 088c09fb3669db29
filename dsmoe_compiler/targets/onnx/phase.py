"""One step of a language model as a function of its cache: a prompt, its next part, or one token.

    (ids [B, S], past: key and value of each layer in turn, [B, heads, P, D] each)
        -> (logits [B, V] of the last position, experts [L, B*S, K], present: the same, [B, heads, P+S, D])

Nothing is written in place, and B, S and P are free: P = 0 reads a prompt, S = 1 adds a token. `model/` knows nothing
of this: its parts are called with a cache that grows by concatenation.

B sequences, S new tokens, P past ones, V vocabulary, L layers with routed experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_compiler.runner import Shapes
from dsmoe_model.attention import Place
from dsmoe_model.moe import MoE
from dsmoe_model.rope import rotary_table
from dsmoe_model.transformer import Transformer

TRACED = {"batch": 2, "sequence": 3, "past": 5}  # sizes of 0 and 1 would be taken for constants


class Step(nn.Module):
    """The reference model's step."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, past: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        model = self.model
        x_BSH = model.embed_tokens(ids)
        where = place(model, x_BSH, past[0].shape[2])
        chosen, present = [], []
        for number, layer in enumerate(model.layers):
            slots = Growing(past[2 * number], past[2 * number + 1])
            x_BSH = x_BSH + layer.self_attn(layer.input_layernorm(x_BSH), where, slots)  # type: ignore[operator]
            present += slots.now
            normed_BSH = layer.post_attention_layernorm(x_BSH)  # type: ignore[operator]
            if isinstance(layer.mlp, MoE):  # it was raised for one row of tokens; to it all tokens are alike
                y_1TH, routing = layer.mlp(normed_BSH.reshape(1, -1, normed_BSH.shape[-1]), ids.reshape(1, -1), None)
                chosen += [] if routing is None else [routing.experts_TK]
                x_BSH = x_BSH + y_1TH.reshape(x_BSH.shape)
            else:
                x_BSH = x_BSH + layer.mlp(normed_BSH)  # type: ignore[operator]
        logits_BV = model.lm_head(model.norm(x_BSH[:, -1]))
        experts = torch.stack(chosen) if chosen else ids.new_empty(0, ids.shape[0] * ids.shape[1], 0)
        return logits_BV.float(), experts, present


class Growing:
    """A layer's keys and values behind the interface that attention writes a fixed cache through."""

    def __init__(self, *past: Tensor) -> None:
        self.past, self.now = past, list(past)

    def __getitem__(self, side: int) -> Any:
        return _Side(self, side)

    def __iter__(self) -> Any:
        return iter(self.now)


class _Side:
    def __init__(self, slots: Growing, side: int) -> None:
        self.slots, self.side = slots, side

    def index_copy_(self, dim: int, _position: Tensor, new: Tensor) -> None:
        self.slots.now[self.side] = torch.cat((self.slots.past[self.side], new), dim=dim)


def place(model: Transformer, x_BSH: Tensor, past: int) -> Place:
    """The new tokens stand after `past` others, and see them and themselves."""
    end = past + x_BSH.shape[1]
    position_S = torch.arange(past, end, device=x_BSH.device)
    mask_SC = torch.arange(end, device=x_BSH.device)[None, :] <= position_S[:, None]
    cos_SD, sin_SD = rotary_table(position_S, model.config.head_dim, model.config.rope_theta, x_BSH.dtype)
    return Place(position_S, cos_SD, sin_SD, mask_SC)


def example_inputs(shapes: Shapes, dtype: torch.dtype) -> tuple[tuple[Any, ...], Any]:
    """Inputs to trace a step with, and their free dimensions. Of `shapes`, heads and widths count."""
    batch, sequence, past = TRACED.values()
    sides = [side for pair in shapes for side in pair]
    tensors = [torch.zeros(batch, heads, past, width, dtype=dtype) for _, heads, _, width in sides]
    free = {name: torch.export.Dim(name, min=0 if name == "past" else 1) for name in TRACED}
    dimensions = {0: free["batch"], 2: free["past"]}
    return (torch.zeros(batch, sequence, dtype=torch.int64), tensors), (
        {0: free["batch"], 1: free["sequence"]},
        [dimensions] * len(tensors),
    )
