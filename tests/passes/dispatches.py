"""Routed experts as libraries write them, grouped and batched, with one thing done otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

E, K, H, WIDTH, TOKENS = 5, 2, 16, 8, 6


class Dispatch(nn.Module):
    """Experts `[E, 2I, H]` and `[E, H, I]` on given routing; `twist` names what is done otherwise."""

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).bfloat16())

        self.twist = twist
        up = WIDTH if twist == "ungated" else 2 * WIDTH
        self.gate_up = weight(E, H, up) if twist == "transposed" else weight(E, up, H)
        self.down = weight(E, WIDTH, H) if twist == "transposed" else weight(E, H, WIDTH)
        self.gate_up_bias, self.down_bias = weight(E, up), weight(E, H)
        self.norm = weight(H)

    def activation(self, hidden: Tensor) -> Tensor:
        if self.twist == "ungated":
            return F.relu(hidden).square()
        if self.twist == "activation reads a parameter":
            return F.silu(hidden * self.norm)[:, :WIDTH] * hidden[:, WIDTH:]
        if self.twist == "activation reads part of one":
            return hidden[:, :WIDTH] * self.gate_up_bias[0, :WIDTH]
        gate, up = hidden.chunk(2, dim=-1)
        if self.twist == "interleaved":
            gate, up = hidden[:, 0::2], hidden[:, 1::2]
        if self.twist == "gate and up swapped":
            gate, up = up, gate
        if self.twist == "other activation":
            return torch.tanh(gate) * up
        if self.twist == "float activation":
            return (F.silu(gate.float()) * up.float()).to(gate.dtype)
        return F.silu(gate) * up

    def answers(self, out: Tensor) -> Tensor:
        if self.twist == "norm":
            return out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norm
        return F.softplus(out) if self.twist == "softplus" else out


class Grouped(Dispatch):
    """Sorted rows and grouped GEMMs."""

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        flat, twist = ids.reshape(-1), self.twist
        in_order, order = torch.sort(flat, descending=twist == "descending")
        tokens = order // (K + 1 if twist == "other token" else K)
        rows = x[order % x.shape[0]] if twist == "slots by expert first" else x[tokens]
        if twist == "weights on the input":
            rows = rows * weights.reshape(-1)[order][:, None]
        offsets = self.offsets(flat, in_order, ids)
        if twist == "transposed":
            gate_up, down = self.gate_up, self.down
        else:
            gate_up, down = self.gate_up.transpose(1, 2), self.down.mT
        gate_up = gate_up * 2 if twist == "weights computed" else gate_up
        hidden = torch._grouped_mm(rows, gate_up, offs=offsets)
        if twist in ("bias", "bias of the first only", "bias by slot", "bias masked"):
            at = flat if twist == "bias by slot" else in_order.clamp(max=E - 1) if twist == "bias masked" else in_order
            hidden = hidden + self.gate_up_bias[at]
        if twist == "bias masked":
            hidden = hidden.masked_fill((in_order >= E)[:, None], 0.0)
        if twist == "last expert masked":
            hidden = hidden.masked_fill((in_order >= E - 1)[:, None], 0.0)
        out = torch._grouped_mm(
            self.activation(hidden), down, offs=offsets.flip(0) if twist == "other offsets" else offsets
        )
        out = out + self.down_bias[in_order] if twist == "bias" else out
        y = self.combine(self.answers(out), weights, order, x)
        return (y, hidden.sum()) if twist == "hidden used" else (y, out.sum()) if twist == "output used" else (y,)

    def offsets(self, flat: Tensor, in_order: Tensor, ids: Tensor) -> Tensor:
        twist = self.twist
        if twist == "bincount":
            counts = torch.bincount(flat, minlength=E)[:E]
        elif twist == "one hot":
            counts = F.one_hot(flat, E).sum(0)
        elif twist == "other ids":
            counts = torch.histc((ids + 0).reshape(-1).float(), bins=E, min=0, max=E - 1)
        elif twist == "other range":
            counts = torch.histc(in_order.float(), bins=E, min=0, max=E)
        else:
            counts = torch.histc(in_order.float(), bins=E, min=1 if twist == "first bin" else 0, max=E - 1)
        return torch.cumsum(counts, 0, dtype=torch.int32)

    def combine(self, out: Tensor, weights: Tensor, order: Tensor, x: Tensor) -> Tensor:
        twist = self.twist
        column = weights.reshape(-1)[order][:, None]
        if twist == "weights by slot":
            column = weights.reshape(-1, 1)
        if twist == "float16 product":
            out = (out.half() * column.half()).to(out.dtype)
        elif twist not in ("unweighted", "weighted by slot"):
            out = column * out if twist == "weights first" else out * column
        if twist == "index_add":
            return torch.zeros_like(x).index_add(0, order // K, out)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        if twist == "argsort":
            inverse = torch.argsort(order)
        out = out[order] if twist == "order for inverse" else out if twist == "not put back" else out[inverse]
        if twist == "weighted by slot":
            out = out * weights.reshape(-1)[:, None]
        if twist == "other sum":
            return out.view(K, -1, H).sum(0).to(x.dtype)
        grouped = out.view(-1, K, H)
        return grouped.sum(2) if twist == "sum of the width" else grouped.sum(1).to(x.dtype)


class Batched(Dispatch):
    """Rows repeated, weights gathered, batched GEMMs."""

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        flat, twist = ids.reshape(-1), self.twist
        if twist == "expanded":
            rows = x[:, None].expand(-1, K, -1).reshape(-1, H)
        elif twist == "tokens gathered":
            rows = x[torch.arange(x.shape[0])[:, None].expand(-1, K).reshape(-1)]
        else:
            rows = x.repeat(K, 1) if twist == "tiled" else x.repeat_interleave(K, dim=0)
        rows = rows * 2 if twist == "weights on the input" else rows
        flat = flat.clamp(0, E - 1) if twist == "clamped" else flat
        gate_up, down = self.gate_up[flat], self.down[flat.flip(0) if twist == "other ids" else flat]
        if twist == "transposed":
            hidden = torch.bmm(rows[:, None], gate_up).squeeze(1)
        elif twist == "right":
            hidden = (rows[:, None] @ gate_up.mT).squeeze(1)
        else:
            hidden = torch.bmm(gate_up, rows[..., None]).squeeze(-1)
        hidden = hidden + self.gate_up_bias[flat] if twist == "bias" else hidden
        acted = self.activation(hidden)
        if twist == "transposed":
            out = torch.bmm(acted[:, None], down).squeeze(1)
        else:
            out = torch.bmm(down, acted[..., None]).squeeze(-1)
        out = self.answers(out + self.down_bias[flat] if twist == "bias" else out)
        column = weights.reshape(-1)[:, None]
        if twist == "slots":
            return ((out.view(-1, K, H) * weights[:, :, None]).sum(1),)
        out = out if twist == "unweighted" else out * (column.flip(0) if twist == "weights reversed" else column)
        return (out.view(-1, K, H).sum(-2).to(x.dtype),)


def routing(tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """x, weights and ids, one expert without a token."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, H, generator=generator).bfloat16()
    weights = torch.rand(tokens, K, generator=generator).bfloat16()
    return x, weights, torch.rand(tokens, E - 1, generator=generator).topk(K).indices


def trace(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The graph that the passes see, with a free number of tokens."""
    tokens = torch.export.Dim("tokens", min=2)
    dynamic = tuple({0: tokens} for _ in inputs)
    program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
    return program.run_decompositions({}).module(check_guards=False)
