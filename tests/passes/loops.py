"""A mixture-of-experts layer written out, with one thing done otherwise: what the matchers must tell apart."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dsmoe_runtime.ops  # noqa: F401  registers the operators

E, K, H, WIDTH, TOKENS = 5, 2, 12, 8, 6


class Loop(nn.Module):
    """The oracle's loop over experts behind a softmax gate; `twist` names what is done otherwise."""

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) / shape[-1] ** 0.5)

        self.twist = twist
        self.router = weight(E, H)
        self.gate_up = weight(E, H, 2 * WIDTH) if twist == "transposed" else weight(E, 2 * WIDTH, H)
        self.down = weight(E, WIDTH, H) if twist == "transposed" else weight(E, H, WIDTH)
        self.bias = weight(E, 2 * WIDTH)
        self.down_bias = weight(E, H)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores = F.linear(x.float(), self.router.float()).softmax(-1)
        experts = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :K]
        return self.experts(x, scores.gather(1, experts), experts)

    def experts(self, x: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, ...]:
        acc = torch.promote_types(x.dtype, torch.float32)
        y = x.to(acc) * 1.5 if self.twist == "starts from x" else torch.zeros_like(x, dtype=acc)
        more: list[Tensor] = []
        hot = F.one_hot(experts, E).permute(2, 1, 0)
        for e in range(E - 1 if self.twist == "expert missing" else E):
            token, slot = torch.where(hot[e])[::-1] if self.twist == "one hot" else torch.where(experts == e)
            token = slot if self.twist == "slot for token" else token
            hidden = self.gemm(self.rows(x, token, e), self.gate_up[e], self.bias[self.bias_of(e)])
            down = self.down[(e + 1) % E if self.twist == "other expert" else e]
            out = self.gemm(self.activation(hidden, e), down, self.down_bias[e])
            if self.twist == "intermediate used" and e == 1:
                more.append(hidden.sum())
            y = self.add(y, token, out, weights[token, 1 - slot if self.twist == "other slot" else slot])
        if self.twist == "weights used elsewhere":
            more.append(self.gate_up.sum())
        return (y.to(x.dtype), experts, *more)

    def bias_of(self, e: int) -> int:
        return (e + 1) % E if self.twist == "other bias" else e

    def gemm(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.twist == "transposed":
            return rows @ weight
        return F.linear(rows, weight, bias if "bias" in self.twist else None)

    def rows(self, x: Tensor, token: Tensor, e: int) -> Tensor:
        if self.twist == "one hot":
            return x[None, token].reshape(-1, H)
        return (x * 2)[token] if self.twist == "other input" and e == 2 else x[token]

    def activation(self, hidden: Tensor, e: int) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        if self.twist == "gate and up swapped":
            return gate * F.silu(up)
        if self.twist == "other activation" or (self.twist == "one other activation" and e == 3):
            return torch.tanh(gate) * up
        if self.twist == "interleaved":
            return F.silu(hidden[:, 0::2]) * hidden[:, 1::2]
        return F.silu(gate) * up

    def add(self, y: Tensor, token: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        if self.twist == "unweighted":
            return y.index_add(0, token, out.float())
        if self.twist == "added twice":
            return y.index_add(0, token, out.float() * weight[:, None], alpha=2)
        if self.twist == "weighted in bfloat16":
            return y.index_add(0, token, (out.bfloat16() * weight[:, None].bfloat16()).float())
        return y.index_add(0, token, out.to(y.dtype) * weight[:, None])


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(dtype)


def trace(module: nn.Module, x: Tensor, dim: int = 0) -> fx.GraphModule:
    """The graph that the passes see, with a free number of tokens."""
    program = torch.export.export(module, (x,), dynamic_shapes=({dim: torch.export.Dim.DYNAMIC},), strict=False)
    return program.module(check_guards=False)


def called(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if str(node.target) == name]
