"""The operators as PyTorch sees them: opcheck, export, torch.compile, gradients and their limits."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from dsmoe_runtime.errors import CaptureError
from dsmoe_runtime.ops.experts_training import keep
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

TENSOR_NAMES = ("x", "weights", "gate_up", "down", "gate_up_bias", "down_bias")


def leaves(case):
    """The case with every floating tensor asking for a gradient."""
    return {n: t.detach().requires_grad_() if n in TENSOR_NAMES and t is not None else t for n, t in case.items()}


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_opcheck_route(tokens):
    """Schema, fake, autograd registration and dynamic shapes, forward and backward."""
    logits, bias = normal(tokens, 12, seed=0).requires_grad_(), normal(12, seed=1)
    gate = (3, "sigmoid", 4, 2, "top2", True, 1e-20, 2.5)
    torch.library.opcheck(torch.ops.dsmoe.route.default, (logits, bias, *gate))
    weights, experts = torch.ops.dsmoe.route(logits.bfloat16(), None, *gate)
    backward = (weights.detach(), logits.detach(), experts, "softmax", True, 1e-20, 2.5)
    torch.library.opcheck(torch.ops.dsmoe.route_backward.default, backward)


@pytest.mark.parametrize(
    ("layout", "activation", "tokens"),
    [*((layout, "silu", t) for layout in ("concat", "interleaved_transposed") for t in (0, 1, 5)),
     ("ungated", "relu2", 5)],
)  # fmt: skip
def test_opcheck_experts(layout, activation, tokens):
    case = laid_out(expert_case(tokens, bias=layout != "concat"), layout)
    torch.library.opcheck(torch.ops.dsmoe.experts.default, (), leaves(case) | attributes(activation, layout))
    torch.library.opcheck(torch.ops.dsmoe.experts_training.default, (), leaves(case) | attributes(activation, layout))
    backward = {"grad": case["x"]} | case | attributes(activation, layout)
    kept = keep(case["x"], case["experts"], case["gate_up"], case["gate_up_bias"], layout)
    for weight_grads, saved in ((False, ()), (True, ()), (True, kept)):
        backward |= {"weight_grads": weight_grads} | dict(zip(("joint", "slots", "offsets"), saved, strict=False))
        torch.library.opcheck(torch.ops.dsmoe.experts_backward.default, (), backward)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("shared", [0, 1])
def test_opcheck_moe(tokens, shared):
    config = small_config(n_shared_experts=shared, **GATES["V3"])
    arguments = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and i != 2 else a
        for i, a in enumerate(moe_arguments(layer_of(config)))
    ]
    if shared:
        arguments[1], arguments[-1] = normal(12, seed=1), weight(1, 42, seed=2)
    inputs = (normal(tokens, 42, seed=3).requires_grad_(), *arguments)
    for operator in (torch.ops.dsmoe.moe.default, torch.ops.dsmoe.moe_training.default):
        torch.library.opcheck(operator, inputs)


@pytest.mark.parametrize(("activation", "layout"), COMBINATIONS)
def test_gradcheck_experts(activation, layout):
    """Against finite differences in float64; one slot is skipped and gets no gradient."""
    case = laid_out(exact(expert_case(4, hidden=5, width=3, num_experts=4, top_k=2, bias=True)), layout)
    case["weights"] = case["weights"].double()
    case["experts"][1, 0] = 4

    def function(*tensors):
        return run(case | dict(zip(TENSOR_NAMES, tensors, strict=True)), activation, layout)

    tensors = tuple(case[name].detach().requires_grad_() for name in TENSOR_NAMES)
    assert gradcheck(function, tensors)
    function(*tensors).sum().backward()
    assert tensors[1].grad[1, 0] == 0


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck_moe(gate):
    """Every weight of the layer, the router's bias and the shared gate included."""
    config = small_config(hidden_size=6, moe_intermediate_size=3, n_shared_experts=1, **GATES[gate])
    arguments = list(moe_arguments(layer_of(config, torch.float64)))
    arguments[1], arguments[-1] = normal(12, seed=1, dtype=torch.float64), weight(1, 6, seed=2, dtype=torch.float64)
    places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and i != 2]

    def function(x, *tensors):
        given = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return torch.ops.dsmoe.moe(x, *given)[0]

    tensors = (normal(3, 6, seed=3, dtype=torch.float64), *(arguments[i] for i in places))
    assert gradcheck(function, tuple(t.detach().requires_grad_() for t in tensors), fast_mode=True)


def test_a_frozen_weight_gets_no_gradient_and_the_others_do():
    """Row 19: never a silent detach."""
    case = expert_case(6)
    x = case["x"].requires_grad_()
    run(case).sum().backward()
    assert x.grad.abs().sum() > 0
    for name in ("x", "weights", "gate_up", "down"):
        one = expert_case(6)
        one[name].requires_grad_()
        run(one).sum().backward()
        full = leaves(expert_case(6))
        run(full).sum().backward()
        assert torch.equal(one[name].grad, full[name].grad)


def test_gradients_are_in_the_dtype_of_their_tensor():
    case = leaves(expert_case(6, bias=True, dtype=torch.bfloat16))
    run(case).sum().backward()
    for name in TENSOR_NAMES:
        assert case[name].grad.dtype == case[name].dtype
        assert case[name].grad.shape == case[name].shape


@pytest.mark.parametrize("name", ["route", "experts", "moe"])
def test_a_second_derivative_is_refused_by_name(name):
    layer = layer_of(small_config())
    x = normal(4, 12 if name == "route" else 42, seed=0).requires_grad_()
    if name == "route":
        y = torch.ops.dsmoe.route(x, None, 3, "softmax", 1, 1, "max", False, 1e-20, 1.0)[0]
    elif name == "experts":
        y = run(expert_case(4) | {"x": x})
    else:
        y = torch.ops.dsmoe.moe(x, *moe_arguments(layer))[0]
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(CaptureError, match=f"dsmoe::{name}_backward has no gradient"):
        grad.sum().backward()


class Layer(torch.nn.Module):
    """One dsmoe::moe between two elementwise neighbours, the MoE's input read again after it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer_of(small_config(**GATES["V3"]))

    def forward(self, x):
        x = x * 2
        y, experts = torch.ops.dsmoe.moe(x, *moe_arguments(self.layer))
        return x + y, experts


@pytest.mark.parametrize("first", [5, 9])
def test_export_keeps_one_node_for_any_number_of_tokens(first):
    model = Layer()
    tokens = torch.export.Dim("tokens", min=0, max=1 << 20)
    program = torch.export.export(model, (normal(first, 42, seed=0),), dynamic_shapes=({0: tokens},))
    for graph in (program.graph, program.run_decompositions().graph):
        assert [n.target for n in graph.nodes if "dsmoe" in str(n.target)] == [torch.ops.dsmoe.moe.default]
    for count in (0, 1, 2, 17):
        x = normal(count, 42, seed=count)
        for actual, expected in zip(program.module()(x), model(x), strict=True):
            assert torch.equal(actual, expected)


def test_compile_runs_any_number_of_tokens_in_one_graph():
    """fullgraph, dynamic, forward and backward; 0 and 1 token may specialise, nothing else recompiles."""
    model = Layer()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (6, 2, 17, 1, 0, 33):
        x = normal(count, 42, seed=count)
        grads = []
        for run_model in (compiled, model):
            model.zero_grad()
            inputs = x.clone().requires_grad_()
            y, experts = run_model(inputs)
            y.square().sum().backward()
            grads.append((y, experts, inputs.grad, model.layer.experts.down_proj.grad))
        for actual, expected in zip(*grads, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.slow
def test_inductor_agrees_to_the_bit():
    model = Layer()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for count in (6, 1, 0, 33):
            x = normal(count, 42, seed=count)
            for actual, expected in zip(compiled(x), model(x), strict=True):
                assert torch.equal(actual, expected)
