"""What an activation is called is found out by running it: every spelling and dtype, and near misses with reasons."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dsmoe_passes.activations import Activation, identify_alone, identify_apart, identify_joined
from dsmoe_passes.result import Mismatch
from dsmoe_runtime.ops.activation import ACTIVATIONS, UNGATED, activate, halves

WIDTH = 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMBERS = {"silu_clamped": (0.0, 10.0), "swiglu_oai": (1.702, 7.0)}


def named(name: str) -> Activation:
    return Activation(name, *NUMBERS.get(name, ()))


def region(function: Callable[..., Tensor], *inputs: Tensor, symbolic: bool = False):
    """The nodes of `function`, traced, its inputs and its result."""
    graph = make_fx(function, tracing_mode="symbolic" if symbolic else "fake")(*inputs).graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (result,) = graph.output_node().args
    return nodes, list(graph.find_nodes(op="placeholder")), result


def joined(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32, layout: str = "concat"):
    """What `identify_joined` says of `function` of gate and up."""
    hidden = torch.randn(6, 2 * WIDTH).to(dtype)
    nodes, (source,), result = region(lambda h: function(*halves(h, layout)), hidden)
    return identify_joined(nodes, source, result, 2 * WIDTH)


def alone(function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Activation:
    nodes, (source,), result = region(function, torch.randn(6, WIDTH).to(dtype))
    return identify_alone(nodes, source, result, WIDTH)


def plain(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """As the operators' rule has it."""
    a = named(name)
    return lambda gate, up: activate(gate, up, a.name, a.alpha, a.limit)


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With casts before and after it."""
    return lambda *inputs: function(*(x.float() for x in inputs)).to(inputs[0].dtype)


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


SPELLINGS: dict[str, tuple[Activation, Callable[[Tensor, Tensor], Tensor]]] = {
    "x times sigmoid": (named("silu"), lambda g, u: u * (g * torch.sigmoid(g))),
    "one divided by": (named("silu"), lambda g, u: u * (g / (1 + torch.exp(-g)))),
    "clamped at infinity": (named("silu"), lambda g, u: F.silu(g).clamp(max=math.inf) * u.clamp(-math.inf, math.inf)),
    "a limit of 7": (Activation("silu_clamped", 0, 7.0), lambda g, u: F.silu(g.clamp(max=7)) * u.clamp(-7, 7)),
    "a limit computed in the graph": (
        Activation("silu_clamped", 0, 10.0),
        lambda g, u: F.silu(torch.minimum(g, limit := torch.full((), 2.5, dtype=g.dtype) * 4)) * u.clamp(-limit, limit),
    ),
    "a limit beside no other number": (
        Activation("silu_clamped", 0, 0.5),
        lambda g, u: F.silu(torch.minimum(g, g.new_full((), 0.5))) * u.clamp(-0.5, 0.5),
    ),
    "gpt-oss": (
        named("swiglu_oai"),
        lambda g, u: (u.clamp(-7, 7) + 1) * (g.clamp(max=7) * torch.sigmoid(g.clamp(max=7) * 1.702)),
    ),
    "another alpha": (
        Activation("swiglu_oai", 1.5, 10.0),
        lambda g, u: (g.clamp(max=10) * torch.sigmoid(g.clamp(max=10) * 1.5)) * (1 + u.clamp(-10, 10)),
    ),
    "by erf": (named("gelu"), lambda g, u: 0.5 * g * (1 + torch.erf(g / math.sqrt(2))) * u),
    "by tanh": (named("gelu_tanh"), lambda g, u: tanh_gelu(g) * u),
    "by tanh with rounded constants": (
        named("gelu_tanh"),
        lambda g, u: 0.5 * g * (1.0 + torch.tanh(g * 0.7978845608 * (1.0 + 0.044715 * g * g))) * u,
    ),
    "the larger of x and 0": (named("relu"), lambda g, u: torch.maximum(g, g.new_zeros(())) * u),
    "relu times x": (named("relu2"), lambda g, u: F.relu(g) * g * u),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_is_found_in_both_orders_of_rows_and_through_casts(name: str, dtype: torch.dtype) -> None:
    for layout in ("concat", "interleaved"):
        for function in (plain(name), in_float32(plain(name))):
            assert joined(function, dtype, layout) == (named(name), layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_is_found_with_gate_and_up_apart(name: str, dtype: torch.dtype) -> None:
    gate, up = (torch.randn(6, WIDTH).to(dtype) for _ in range(2))
    for function in (plain(name), in_float32(plain(name))):
        nodes, (first, second), result = region(function, gate, up)
        assert identify_apart(nodes, first, second, result, WIDTH) == named(name)
        assert identify_apart(nodes, second, first, result, WIDTH) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UNGATED)
def test_each_is_found_without_a_gate(name: str, dtype: torch.dtype) -> None:
    function = lambda x: activate(x, None, name, 0.0, 0.0)  # noqa: E731
    assert alone(function, dtype) == alone(in_float32(function), dtype) == Activation(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str, dtype: torch.dtype) -> None:
    expected, function = SPELLINGS[spelling]
    assert joined(function, dtype) == (expected, "concat")


def clamped(gate: Tensor, up: Tensor, gate_limit: float = 7.0, up_limit: float = 7.0, low: float = -7.0) -> Tensor:
    return F.silu(gate.clamp(max=gate_limit)) * up.clamp(low, up_limit)


def oai(gate: Tensor, up: Tensor, shift: float = 1.0, inner: float = 7.0) -> Tensor:
    return (up.clamp(-7, 7) + shift) * (gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=inner)))


NEAR_MISSES: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "up before gate": ("silu of the second half times the first: up lies before gate", lambda g, u: g * F.silu(u)),
    "up before gate, clamped": (
        r"silu_clamped \(limit 7\) of the second half times the first",
        lambda g, u: clamped(u, g),
    ),
    "two limits": (
        r"none of silu.* the nearest, silu_clamped \(limit 10\)",
        lambda g, u: clamped(g, u, 7.0, 10.0, -10),
    ),
    "clamped on one side": (r"none of silu.* the nearest, silu", lambda g, u: clamped(g, u, low=-math.inf)),
    "clamped behind the activation": ("none of silu", lambda g, u: F.silu(g).clamp(max=7) * u.clamp(-7, 7)),
    "a gate clamped from below": ("none of silu", lambda g, u: F.silu(g.clamp(-7, 7)) * u.clamp(-7, 7)),
    "a clamp far out": ("none of silu.* the nearest, silu, gives", lambda g, u: F.silu(g).clamp(max=60000.0) * u),
    "no shift": ("none of silu", lambda g, u: oai(g, u, 0.0)),
    "another shift": ("none of silu", lambda g, u: oai(g, u, 1.01)),
    "no limit": ("none of silu", lambda g, u: (u + 1) * (g * torch.sigmoid(1.702 * g))),
    "a sigmoid of the gate unclamped": ("none of silu", lambda g, u: oai(g, u, inner=math.inf)),
    "a quick gelu": ("none of silu", lambda g, u: g * torch.sigmoid(1.702 * g) * u),
    "another cubic": ("none of silu.* the nearest, gelu_tanh", lambda g, u: F.gelu(g * 1.0001, approximate="tanh") * u),
    "a leaky relu": ("none of silu", lambda g, u: F.leaky_relu(g) * u),
    "relu6": ("none of silu", lambda g, u: F.relu6(g) * u),
    "mish": ("none of silu", lambda g, u: F.mish(g) * u),
    "a softcap": ("none of silu", lambda g, u: torch.tanh(g / 4) * 4 * torch.sigmoid(g) * torch.tanh(u / 25) * 25),
    "twice as much": ("none of silu", lambda g, u: 2 * F.silu(g) * u),
    "a norm": ("none of silu", lambda g, u: F.silu(g) * u / (F.silu(g) * u).norm(dim=-1, keepdim=True)),
    "rows mixed": ("none of silu", lambda g, u: F.silu(g) * u.flip(0)),
    "a gate alone": ("none of silu", lambda g, u: F.silu(g)),
    "a sum over the width": (r"it makes \[\d+, 1\] of that", lambda g, u: (F.silu(g) * u).sum(-1, keepdim=True)),
    "rounded to eight bits": (
        "none of silu.* the nearest, silu",
        lambda g, u: (F.silu(g) * u).to(torch.float8_e5m2).to(g.dtype),
    ),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_near_misses_say_what_they_are_nearest_to(miss: str) -> None:
    reason, function = NEAR_MISSES[miss]
    with pytest.raises(Mismatch, match=reason):
        joined(function)
    with pytest.raises(Mismatch, match=reason):
        joined(in_float32(function), torch.bfloat16)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.gelu(x) * x, "the activation is none of silu, gelu, gelu_tanh, relu, relu2: the nearest"),
        (lambda x: F.relu(x).pow(3), "none of silu.* gives .* for .*, this one"),
        (lambda x: F.silu(x.clamp(max=7.0)), "the nearest, silu, gives"),
        (lambda x: x.sigmoid() * (1.702 * x), "none of silu"),
        (lambda x: F.relu(x).square() + 1e-3, "the nearest, relu"),
    ],
)
def test_near_misses_without_a_gate(function: Callable[[Tensor], Tensor], reason: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(Mismatch, match=reason):
            alone(function, dtype)


def test_what_lies_outside_and_what_cannot_run_is_said() -> None:
    nodes, (hidden, scale), result = region(lambda x, s: F.silu(x) * s, torch.randn(6, WIDTH), torch.randn(WIDTH))
    with pytest.raises(Mismatch, match=f"{scale.name} is needed to probe the region but lies outside it"):
        identify_alone(nodes, hidden, result, WIDTH)
    nodes, (hidden,), result = region(lambda x: F.silu(x).view(torch.int32), torch.randn(6, WIDTH))
    with pytest.raises(Mismatch, match="cannot be tried out on"):
        identify_alone(nodes, hidden, result, WIDTH)
    with pytest.raises(Mismatch, match="is 9 wide, which is not two equal halves"):
        identify_joined(nodes, hidden, result, 9)


@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1,), (3, 4)])
def test_views_of_the_sizes_that_the_graph_has(shape: tuple[int, ...], symbolic: bool) -> None:
    """A region may flatten its rows, or write their number down."""

    def function(hidden: Tensor) -> Tensor:
        gate, up = hidden.reshape(-1, 2 * WIDTH).chunk(2, dim=-1)
        return (F.gelu(gate) * up).view(*shape, WIDTH)

    nodes, (hidden,), result = region(function, torch.randn(*shape, 2 * WIDTH), symbolic=symbolic)
    assert identify_joined(nodes, hidden, result, 2 * WIDTH) == (Activation("gelu"), "concat")


def test_a_reason_reads_well() -> None:
    with pytest.raises(Mismatch) as caught:
        joined(lambda g, u: clamped(g, u, 7.0, 10.0, -10.0))
    reason = str(caught.value)
    assert "silu_clamped (limit 10), gives " in reason
    assert " for gate " in reason
    assert "\n" not in reason
    assert isinstance(caught.value.node, fx.Node)


@pytest.mark.parametrize("width", [5, 12, 24, 30, 48])
def test_rounding_at_far_numbers_is_no_difference(width: int) -> None:
    """1 + tanh(z) of a low z is a unit in the last place, or nothing, as vector lanes fall; then times an up of 1e5."""
    hidden = torch.randn(6, 2 * width)
    gated = region(lambda h: F.gelu(h[:, :width], approximate="tanh") * h[:, width:], hidden)
    nodes, (source,), result = gated
    assert identify_joined(nodes, source, result, 2 * width) == (named("gelu_tanh"), "concat")
