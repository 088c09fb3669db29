"""The activations by themselves: against formulas written out and autograd in float64, at bends and far out."""

from __future__ import annotations

import math

import pytest
import torch

from dsmoe_runtime.ops.activation import ACTIVATIONS, UNGATED, activate, activate_backward, halves, has_gate, joined
from dsmoe_runtime.ops.experts import LAYOUTS
from tests.runtime.op_cases import ALPHA, LIMIT, normal

EPS = torch.finfo(torch.float64).eps
CALLS = [*((name, True) for name in ACTIVATIONS), *((name, False) for name in UNGATED)]


def written_out(name: str, g: float, u: float) -> float:
    """One value by Python's own functions."""
    if name == "gelu":
        return g * math.erfc(-g / math.sqrt(2)) / 2 * u
    if name == "gelu_tanh":
        return g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2 * u
    if name == "relu":
        return max(g, 0.0) * u
    if name == "relu2":
        return max(g, 0.0) ** 2 * u
    if name != "silu":
        g, u = min(g, LIMIT), min(max(u, -LIMIT), LIMIT)
    if name == "swiglu_oai":
        return (u + 1) * g / (1 + math.exp(-ALPHA * g))
    return g / (1 + math.exp(-g)) * u


@pytest.mark.parametrize(("name", "gated"), CALLS)
def test_values_are_those_of_the_formula(name, gated):
    gate, up = 2 * normal(300, seed=1, dtype=torch.float64), 2 * normal(300, seed=2, dtype=torch.float64)
    actual = activate(gate, up if gated else None, name, ALPHA, LIMIT)
    pairs = zip(gate.tolist(), up.tolist() if gated else 300 * [1.0], strict=True)
    expected = torch.tensor([written_out(name, g, u) for g, u in pairs], dtype=torch.float64)
    assert ((actual - expected).abs() <= 16 * EPS * (gate.abs() * (up.abs() + 1) + gate**2)).all()


@pytest.mark.parametrize(("name", "gated"), CALLS)
def test_gradients_are_those_of_autograd(name, gated):
    gate, up = (2 * normal(300, seed=seed, dtype=torch.float64) for seed in (1, 2))
    grad = normal(300, seed=3, dtype=torch.float64)
    inputs = [gate, up] if gated else [gate]
    leaves = [t.clone().requires_grad_() for t in inputs]
    result = activate(leaves[0], leaves[1] if gated else None, name, ALPHA, LIMIT)
    expected = torch.autograd.grad(result, leaves, grad)
    actual = activate_backward(grad, gate, up if gated else None, name, ALPHA, LIMIT)
    assert (actual[1] is None) != gated
    for ours, theirs in zip(actual, expected, strict=False):
        assert (ours - theirs).norm() <= 16 * EPS * theirs.norm()


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_far_out_and_at_the_bend(name):
    """No overflow on the way to what has a limit; 0 has the slope that torch gives it; NaN stays NaN."""
    x = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4])
    hidden = activate(x, None, name, 0.0, 0.0)
    slope, _ = activate_backward(torch.ones_like(x), x, None, name, 0.0, 0.0)
    assert hidden.tolist() == [0, 0, 0, 0, *((1e4, 1e8) if name == "relu2" else (100, 1e4))]
    middle = 0.0 if name.startswith("relu") else 0.5
    assert slope.tolist() == [0, 0, middle, middle, *((200, 2e4) if name == "relu2" else (1, 1))]
    nan = torch.full((2,), torch.nan)
    assert activate(nan, None, name, 0.0, 0.0).isnan().all()
    assert activate(nan, nan, name, 0.0, 0.0).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_and_back(layout):
    joint = normal(3, 10, seed=1)
    gate, up = halves(joint, layout)
    assert gate.shape[-1] == (5 if has_gate(layout) else 10)
    assert torch.equal(joined(gate, up, layout), joint)
    assert gate.data_ptr() == joint.data_ptr()  # a view
