"""Layers of transformers whose experts are one operator already: with their gate they become `dsmoe::moe`.

How experts are spelled is `match_experts`' affair and tested there; here they are registered as an experts
implementation, so that what is left to recognise is the gate and the shared experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dsmoe_compiler import backend
from dsmoe_compiler.huggingface.registration import register_experts
from dsmoe_passes import pipeline
from dsmoe_passes.result import PassResult
from dsmoe_runtime.agreement import assert_within_budget
from tests.passes.hf_models import FAMILIES, tiny
from tests.passes.loops import called, trace

H = 32
PLAIN = (2, "softmax", 1, 1, "max", False, 0.0, 1.0)
GATES = {
    "deepseek_v2": (2, "softmax", 1, 1, "max", False, 0.0, 1.5),  # the best two are in the two groups with the best one
    "deepseek_v3": (2, "sigmoid", 4, 2, "top2", True, 1e-20, 2.5),
    "deepseek_ocr2": PLAIN,
    "qwen2_moe": PLAIN,
    "qwen3_moe": (2, "softmax", 1, 1, "max", True, 0.0, 1.0),
    "mixtral": (2, "softmax", 1, 1, "max", True, 0.0, 1.0),
    "olmoe": PLAIN,
    "glm4_moe": (2, "sigmoid", 1, 1, "max", True, 1e-20, 2.5),
    "gpt_oss": (2, "softmax_after_topk", 1, 1, "max", False, 0.0, 1.0),
}
SHARED = {"deepseek_v2", "deepseek_v3", "deepseek_ocr2", "qwen2_moe", "glm4_moe"}
GATE_OPERATORS = {"topk", "sort", "gather", "scatter", "sigmoid", "softmax", "masked_fill", "experts", "route"}


class First(nn.Module):
    """A layer of the model, and of what it returns the hidden states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


@pytest.fixture(autouse=True)
def raised_experts() -> Iterator[None]:
    with register_experts():
        yield


def layer(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> First:
    model = tiny(family, dtype=dtype, experts_implementation="dsmoe", **changes)
    return First(next(module for module in model.modules() if hasattr(module, "experts")))


class Compiled:
    """A layer through torch.compile and the passes, without a code generator; `graphs` and `results` are what came."""

    def __init__(self, module: nn.Module) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.results: list[dict[str, PassResult]] = []
        torch._dynamo.reset()
        self.run = torch.compile(module, backend=self._backend)

    def _backend(self, gm: fx.GraphModule, example_inputs: list) -> Any:
        graph = backend.functional(gm, example_inputs)
        self.results.append({step.result.name: step.result for step in pipeline.run(graph)})
        self.graphs.append(graph)
        return graph.forward

    @property
    def node(self) -> fx.Node:
        (graph,) = self.graphs
        (node,) = called(graph, "dsmoe.moe.default")
        return node


def tokens(batch: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, H, generator=torch.Generator().manual_seed(length)).to(dtype)


def chosen(module: First, x: Tensor) -> Tensor:
    """The ids that the experts of `module` are given for `x`, in rising order."""
    seen: list[Tensor] = []
    handle = module.layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    module(x)
    handle.remove()
    return seen[0].sort(dim=-1).values


def check_operator(family: str, node: fx.Node, dtype: torch.dtype) -> None:
    assert node.args[4:12] == GATES[family]
    assert (node.args[2] is not None) == (family == "gpt_oss")
    assert (node.args[3] is not None) == (family in ("deepseek_v3", "glm4_moe"))
    rounded = family == "gpt_oss" and dtype is not torch.float32
    assert node.args[12] == ("activation" if rounded else "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_layer_is_one_operator_within_eagers_budget(family: str, dtype: torch.dtype) -> None:
    module = layer(family, dtype)
    x = tokens(2, 24, dtype)
    compiled = Compiled(module)
    ours, eager = compiled.run(x), module(x)
    check_operator(family, compiled.node, dtype)
    (results,) = compiled.results
    assert not results["match_router"].refused
    assert not results["fuse_moe"].refused
    assert all("only joined where parameters are packed" in r.because for r in results["match_shared"].refused)
    left = {str(n.target).split(".")[1] for n in compiled.graphs[0].graph.nodes if "." in str(n.target)}
    assert not left & (GATE_OPERATORS - ({"sigmoid"} if family == "qwen2_moe" else set()))

    ids = [torch.ops.dsmoe.moe(*_values(compiled, module, x))[1].sort(dim=-1).values, chosen(module, x)]
    exact, exact_ids = module.double()(x.double()), chosen(module, x.double())
    wrong = [(mine != exact_ids).any(dim=-1) for mine in ids]
    assert wrong[0].sum() <= wrong[1].sum()  # our selection is no worse than eager's
    same = ~(wrong[0] | wrong[1])
    assert same.double().mean() > 0.9
    rows = [y.reshape(-1, H)[same] for y in (ours, eager, exact)]
    assert_within_budget(rows[0], eager=rows[1], exact=rows[2])


def _values(compiled: Compiled, module: First, x: Tensor) -> list:
    """The operands that the operator had for `x`."""
    kept: list = []

    class Keep(fx.Interpreter):
        def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
            if target is torch.ops.dsmoe.moe.default:
                kept.extend(args)
            return super().call_function(target, args, kwargs)

    def run(gm: fx.GraphModule, example_inputs: list) -> Any:
        return lambda *inputs: Keep(compiled.graphs[0]).run(*inputs)

    torch._dynamo.reset()
    torch.compile(module, backend=run)(x)
    return kept


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_trace_of_one_token_is_recognised_as_well(family: str) -> None:
    module = layer(family)
    compiled = Compiled(module)
    x = tokens(1, 1)
    assert (compiled.run(x) - module(x)).norm() <= 1e-5 * module(x).norm()
    check_operator(family, compiled.node, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_free_number_of_tokens_stays_free(family: str) -> None:
    module = layer(family)
    compiled = Compiled(module)
    x = tokens(2, 7)
    torch._dynamo.mark_dynamic(x, 1)
    for length in (7, 2, 19):
        given = x if length == 7 else tokens(2, length)
        assert (compiled.run(given) - module(given)).norm() <= 1e-5 * module(given).norm()
    check_operator(family, compiled.node, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_eagers(family: str) -> None:
    module, x = layer(family).train(), tokens(2, 12).requires_grad_()
    compiled = Compiled(module)
    direction = tokens(2, 12).flip(0)

    def gradients(run: Any) -> dict[str, Tensor]:
        wanted = {"x": x, **{n: p for n, p in module.named_parameters() if p.requires_grad}}
        found = torch.autograd.grad((run(x) * direction).sum(), list(wanted.values()), allow_unused=True)
        return {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}

    ours, eager = gradients(compiled.run), gradients(module)
    check_operator(family, compiled.node, torch.float32)
    assert set(ours) == set(eager)
    for name, grad in eager.items():
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm(), name


@pytest.mark.parametrize("family", sorted(SHARED))
@torch.no_grad()
def test_with_its_parameters_in_the_graph_the_layer_takes_its_shared_experts(family: str) -> None:
    module = layer(family)
    gm = trace(module, tokens(2, 6), dim=1)
    results = {step.result.name: step.result for step in pipeline.run(gm)}
    (node,) = called(gm, "dsmoe.moe.default")
    check_operator(family, node, torch.float32)
    assert node.args[-3] is not None
    assert (node.args[-1] is not None) == (family == "qwen2_moe")
    assert len(results["pack_weights"].rewritten) == 1
    assert not called(gm, "aten.linear.default")
    for length in (1, 40):
        x = tokens(2, length)
        assert (gm(x) - module(x)).norm() <= 1e-5 * module(x).norm()
