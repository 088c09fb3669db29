"""Shared experts, and the gate in front, as models write them: one operator, or the reason that it is two."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dsmoe_runtime.ops  # noqa: F401  registers the operators
from dsmoe_passes import pipeline
from dsmoe_passes.result import PassResult
from dsmoe_runtime.agreement import assert_within_budget
from tests.passes.loops import called, trace

E, K, H, WIDTH, SHARED = 6, 2, 16, 8, 12
MOE = "dsmoe.moe.default"


class Layer(nn.Module):
    """A gate and experts, and what `write(self, x, routed)` makes of their output; x is `[B, S, H]`."""

    def __init__(self, write: Callable[["Layer", Tensor, Tensor], Tensor], layout: str = "concat") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) / shape[-1] ** 0.5)

        self.write, self.layout = write, layout
        self.router = weight(E, H)
        self.gate_up, self.down = weight(E, (1 if layout == "ungated" else 2) * WIDTH, H), weight(E, H, WIDTH)
        self.gate, self.up, self.joined = weight(SHARED, H), weight(SHARED, H), weight(2 * SHARED, H)
        self.out, self.out_bias, self.sigmoid = weight(H, SHARED), weight(H), weight(1, H)

    def routed(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, H)
        logits = F.linear((flat if seen is None else seen.reshape(-1, H)).float(), self.router.float())
        weights, experts = logits.softmax(-1).topk(K)
        activation = "relu2" if self.layout == "ungated" else "silu"
        y = torch.ops.dsmoe.experts(
            flat, experts, weights, self.gate_up, self.down, None, None, activation, 0.0, 0.0, self.layout
        )
        return y.view_as(x)

    def shared(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.out)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self, x, self.routed(x))


def joined(m: Layer, x: Tensor, y: Tensor) -> Tensor:
    gate, up = F.linear(x, m.joined).chunk(2, dim=-1)
    return y + F.linear(F.silu(gate) * up, m.out)


def through_views(m: Layer, x: Tensor, y: Tensor) -> Tensor:
    return y.reshape(-1, H) + m.shared(x.view(-1, H))


def in_float32(m: Layer, x: Tensor, y: Tensor) -> Tensor:
    return (y.float() + m.shared(x).float()).to(x.dtype)


def sigmoid_gated(m: Layer, x: Tensor, y: Tensor) -> Tensor:
    flat = x.view(-1, H)
    return (y.view(-1, H) + F.sigmoid(F.linear(flat, m.sigmoid)) * m.shared(flat)).view_as(x)


def ungated(m: Layer, x: Tensor, y: Tensor) -> Tensor:
    return y + F.linear(F.relu(F.linear(x, m.up)).square(), m.out)


FUSED: dict[str, Callable[[Layer, Tensor, Tensor], Tensor]] = {
    "apart": lambda m, x, y: y + m.shared(x),
    "on the other side": lambda m, x, y: m.shared(x) + y,
    "joined": joined,
    "up before gate": lambda m, x, y: y + F.linear(F.linear(x, m.up) * F.silu(F.linear(x, m.gate)), m.out),
    "through views": through_views,
    "in float32": in_float32,
    "residual between": lambda m, x, y: (x + y) + m.shared(x),
    "residual behind": lambda m, x, y: x + (m.shared(x) + y),
    "scaled": lambda m, x, y: y * 2.5 + m.shared(x),
    "sigmoid-gated": sigmoid_gated,
    "gated on the right": lambda m, x, y: m.shared(x) * F.linear(x, m.sigmoid).sigmoid() + y,
    "not gated": ungated,
}


def passed(module: nn.Module, x: Tensor) -> tuple[fx.GraphModule, dict[str, PassResult]]:
    gm = trace(module, x, dim=1)
    return gm, {step.result.name: step.result for step in pipeline.run(gm)}


def module_of(name: str, write: Callable[[Layer, Tensor, Tensor], Tensor]) -> Layer:
    return Layer(write, "ungated" if name == "not gated" else "concat")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
def test_shared_experts_become_operands(name: str, dtype: torch.dtype) -> None:
    module = module_of(name, FUSED[name]).to(dtype)
    gm, results = passed(module, torch.randn(1, 6, H, dtype=dtype))
    assert not results["match_shared"].refused
    assert len(results["match_shared"].rewritten) == 1
    (node,) = called(gm, MOE)
    assert not called(gm, "aten.linear.default")
    assert (node.args[-1] is not None) == ("gated" in name and name != "not gated")
    assert node.args[11] == (2.5 if name == "scaled" else 1.0)
    assert len(called(gm, "aten.add.Tensor")) == ("residual" in name)
    for tokens in (0, 1, 33):
        x = torch.randn(1, tokens, H, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        exact = module.double()(x.double())
        module.to(dtype)
        assert_within_budget(gm(x), eager=module(x), exact=exact.view(gm(x).shape))


def two_of_them(m: Layer, x: Tensor, y: Tensor) -> Tensor:
    return joined(m, x, y) + m.shared(x)


def hidden_used(m: Layer, x: Tensor, y: Tensor) -> Tensor:
    up = F.linear(x, m.up)
    return y + F.linear(F.silu(F.linear(x, m.gate)) * up, m.out) + up.sum()


REFUSED: dict[str, tuple[Callable[[Layer, Tensor, Tensor], Tensor], str]] = {
    "another input": (lambda m, x, y: y + m.shared(F.rms_norm(x, (H,))), "the shared experts read"),
    "gate of another input": (
        lambda m, x, y: y + F.linear(x * 2, m.sigmoid).sigmoid() * m.shared(x),
        "the shared experts' gate reads mul",
    ),
    "gelu": (
        lambda m, x, y: y + F.linear(F.gelu(F.linear(x, m.gate)) * F.linear(x, m.up), m.out),
        "activation is not the routed experts' silu",
    ),
    "clamped": (
        lambda m, x, y: y + F.linear(F.silu(F.linear(x, m.gate).clamp(max=7.0)) * F.linear(x, m.up), m.out),
        "activation is not the routed experts' silu",
    ),
    "no gate": (lambda m, x, y: y + F.linear(F.relu(F.linear(x, m.up)).square(), m.out), "not"),
    "bias": (
        lambda m, x, y: y + F.linear(F.silu(F.linear(x, m.gate)) * F.linear(x, m.up), m.out, m.out_bias),
        "the shared down GEMM adds a bias (out_bias)",
    ),
    "halved": (lambda m, x, y: y + m.shared(x) * 0.5, "answer is multiplied by 0.5, not by a sigmoid gate"),
    "tanh gate": (
        lambda m, x, y: y + F.linear(x, m.sigmoid).tanh() * m.shared(x),
        "is multiplied by tanh, not by the sigmoid of one GEMM [1, H]",
    ),
    "hidden used": (hidden_used, "has another user"),
    "answer used": (lambda m, x, y: (z := m.shared(x)) + y + z.abs(), "has another user"),
    "weight computed": (
        lambda m, x, y: y + F.linear(F.silu(F.linear(x, m.gate * 2)) * F.linear(x, m.up), m.out),
        "the shared gate or up weight is computed in the graph",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_feed_forward_is_left_alone_and_says_why(name: str) -> None:
    write, because = REFUSED[name]
    module, x = module_of(name, write), torch.randn(1, 6, H)
    gm, results = passed(module, x)
    (refusal,) = results["match_shared"].refused
    assert because in refusal.because, refusal.because
    (node,) = called(gm, MOE)
    assert node.args[-3] is None
    assert (gm(x) - module(x)).norm() <= 1e-5 * module(x).norm()


NO_SUM: dict[str, Callable[[Layer, Tensor, Tensor], Tensor]] = {
    "subtracted": lambda m, x, y: y - m.shared(x),
    "twice": lambda m, x, y: torch.add(y, m.shared(x), alpha=2),
    "output used": lambda m, x, y: (y + m.shared(x)) * y,
    "normed first": lambda m, x, y: F.rms_norm(y, (H,)) + m.shared(x),
    "broadcast": lambda m, x, y: y + m.shared(x[:, :1]),
}


@pytest.mark.parametrize("name", NO_SUM)
def test_what_is_no_sum_with_the_output_is_not_looked_at(name: str) -> None:
    module, x = Layer(NO_SUM[name]), torch.randn(1, 6, H)
    gm, _ = passed(module, x)
    (node,) = called(gm, MOE)
    assert node.args[-3] is None
    assert (gm(x) - module(x)).norm() <= 1e-5 * module(x).norm()


def test_of_two_feed_forwards_one_is_taken() -> None:
    module, x = Layer(two_of_them), torch.randn(1, 6, H)
    gm, results = passed(module, x)
    (refusal,) = results["match_shared"].refused
    assert "has shared experts already" in refusal.because
    (node,) = called(gm, MOE)
    assert node.args[-3] is not None
    assert (gm(x) - module(x)).norm() <= 1e-5 * module(x).norm()


def normed(m: Layer, x: Tensor, y: Tensor) -> Tensor:
    return m.routed(x, F.rms_norm(x, (H,)))


def jittered(m: Layer, x: Tensor, y: Tensor) -> Tensor:
    return m.routed(x, x * torch.empty_like(x).uniform_(0.9, 1.1))


GATES_OF_ANOTHER_INPUT = {"normed": (normed, "the gate reads rms_norm"), "jittered": (jittered, "the gate reads mul")}


@pytest.mark.parametrize("name", GATES_OF_ANOTHER_INPUT)
def test_a_gate_that_reads_something_else_stays_a_route(name: str) -> None:
    write, because = GATES_OF_ANOTHER_INPUT[name]
    gm, results = passed(Layer(write), torch.randn(1, 6, H))
    (refusal,) = results["fuse_moe"].refused
    assert because in refusal.because, refusal.because
    assert "the experts read x" in refusal.because
    assert len(called(gm, "dsmoe.route.default")) == len(called(gm, "dsmoe.experts.default")) == 1
