"""What training keeps from forward to backward: where, how much, and that gradients are the same without it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe_runtime.agreement import row_error
from dsmoe_runtime.ops.experts_training import keep
from dsmoe_runtime.ops.moe_training import composed
from tests.runtime.op_cases import (
    COMBINATIONS,
    GATES,
    attributes,
    exact,
    expert_case,
    laid_out,
    layer_of,
    moe_arguments,
    normal,
    run,
    small_config,
    weight,
)

EPS = torch.finfo(torch.float64).eps


class Called(TorchDispatchMode):
    """The names of our operators in the order of their calls, below autograd."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dsmoe":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("activation", "layout"), COMBINATIONS)
def test_gradients_from_what_is_kept_are_those_computed_again(activation, layout):
    """In float64, with skipped slots and an expert without any."""
    case = exact(laid_out(expert_case(20, num_experts=6, bias=True), layout))
    case["experts"].masked_fill_(case["experts"] == 2, -1)
    inputs = {"grad": normal(20, 42, seed=9, dtype=torch.float64)} | case | attributes(activation, layout)
    joint, slots, offsets = keep(case["x"], case["experts"], case["gate_up"], case["gate_up_bias"], layout)
    again = torch.ops.dsmoe.experts_backward(**inputs, weight_grads=True)
    kept = torch.ops.dsmoe.experts_backward(**inputs, weight_grads=True, joint=joint, slots=slots, offsets=offsets)
    for actual, expected in zip(kept, again, strict=True):
        assert (row_error(actual, expected)[expected.reshape(-1, expected.shape[-1]).any(dim=-1)] < 64 * EPS).all()
    # And it is used: a planted fault in joint shows.
    wrong = torch.ops.dsmoe.experts_backward(**inputs, weight_grads=True, joint=joint * 1.02)
    assert row_error(wrong[1], again[1]).max() > 1e-3  # relu's slope, and with it the rest, is the same


def test_what_is_kept_is_in_the_order_of_the_experts():
    case = expert_case(9, num_experts=5)
    case["experts"][3, 1], case["experts"][4, 0] = -1, 5
    joint, slots, offsets = keep(case["x"], case["experts"], case["gate_up"], None, "concat")
    assert (slots.dtype, offsets.dtype, offsets[0], offsets[-1]) == (torch.int32, torch.int32, 0, 25)
    ids = case["experts"].flatten()
    for expert in range(5):
        own = slots[offsets[expert] : offsets[expert + 1]].long()
        assert torch.equal(own, (ids == expert).nonzero()[:, 0])
        expected = case["x"][own // 3] @ case["gate_up"][expert].T
        torch.testing.assert_close(joint[offsets[expert] : offsets[expert + 1]], expected)


@pytest.mark.parametrize("name", ["experts", "moe"])
def test_training_takes_its_own_operator_and_inference_does_not(name):
    """And on the CPU it keeps no more than its inputs."""
    if name == "experts":
        x, call = normal(7, 42, seed=1), lambda x: run(expert_case(7) | {"x": x})
    else:
        arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in moe_arguments(layer_of(small_config()))]
        x, call = normal(7, 42, seed=1), lambda x: torch.ops.dsmoe.moe(x, *arguments)[0]
    with Called() as called:
        expected = call(x)
        with torch.no_grad():
            call(x.clone().requires_grad_())
    assert called.names == [name, name]
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t)
    with Called() as called, hooks:
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.sum().backward()
    assert called.names[:2] == [f"{name}_training", f"{name}_backward"]
    assert torch.equal(y, expected)
    assert leaf.grad.abs().sum() > 0
    assert sizes.count(0) >= 3  # joint, slots, offsets


@pytest.mark.parametrize("gate", ["v1", "V3"])
@pytest.mark.parametrize("shared", [0, 2])
def test_a_layer_composed_of_operators_is_the_layer(gate, shared):
    """As it runs where kernels are, in float64; its shared joint gives the gradients that the layer's own gives."""
    config = small_config(n_shared_experts=shared, **GATES[gate])
    arguments = list(moe_arguments(layer_of(config, torch.float64)))
    if shared:
        arguments[-1] = weight(1, 42, seed=2, dtype=torch.float64)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    x = normal(11, 42, seed=3, dtype=torch.float64)
    y, experts = torch.ops.dsmoe.moe(x, *arguments)
    router, gated, routed, shared_weights = arguments[:3], arguments[3:11], arguments[12:20], tuple(arguments[20:])
    actual, chosen, *_, shared_joint = composed(x, *router, tuple(gated), arguments[11], tuple(routed), shared_weights)
    assert torch.equal(chosen, experts)
    assert row_error(actual, y).max() < 16 * EPS
    inputs = (normal(11, 42, seed=4, dtype=torch.float64), x, experts, *router[:2], gated[1], *gated[5:], arguments[11])
    inputs += (*routed, *shared_weights, True)
    again = torch.ops.dsmoe.moe_backward(*inputs)
    kept = torch.ops.dsmoe.moe_backward(*inputs, shared_joint=shared_joint)
    for one, other in zip(kept, again, strict=True):
        assert one.shape == other.shape
        assert not one.numel() or (one - other).norm() <= 64 * EPS * other.norm()
