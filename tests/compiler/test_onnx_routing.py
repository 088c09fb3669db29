"""Gates, experts and shared experts as torch.onnx.export writes them, in ONNX Runtime, against float64.

Several layers go through one export: that starts slowly, whatever it exports.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from torch import Tensor, nn

from dsmoe_compiler.targets.onnx.function import add_functions
from dsmoe_compiler.targets.onnx.op import OP_TYPE, check_nodes
from dsmoe_compiler.targets.onnx.routing import TRANSLATIONS, translations
from dsmoe_runtime.agreement import assert_within_budget, routing_agreement, row_error
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ops.experts import run_experts
from dsmoe_runtime.ops.moe import moe as rule
from dsmoe_runtime.ops.route import route, weights_of
from tests.compiler.onnx_nodes import NUMBERS, session, skip_without_tokens
from tests.runtime.op_cases import GATES, in_layout, layer_of, moe_arguments, normal, small_config, weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = {"v1": (12, 3, {}), "V2": (20, 4, {"n_group": 5}), "V3": (63, 7, {"n_group": 9, "topk_group": 3})}


class Layers(nn.Module):
    """Calls of dsmoe::moe on one x, each with its own weights; float32 outside."""

    def __init__(self, calls: dict[str, tuple[Any, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        self.calls, self.dtype = calls, dtype
        for name, arguments in calls.items():
            for index, value in enumerate(arguments):
                if isinstance(value, Tensor):
                    self.register_buffer(f"{name}_{index}", value.detach().contiguous())

    def forward(self, x: Tensor) -> list[Tensor]:
        results = []
        for name, arguments in self.calls.items():
            given = [getattr(self, f"{name}_{i}", value) for i, value in enumerate(arguments)]
            y, experts = torch.ops.dsmoe.moe(x.to(self.dtype), *given)
            results += [y.float(), experts]
        return results


def exported(module: nn.Module, inputs: tuple[Tensor, ...], *, table: Any = TRANSLATIONS) -> onnx.ModelProto:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        free = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
        program = torch.export.export(module, inputs, dynamic_shapes=free)
        made = torch.onnx.export(
            program, dynamo=True, opset_version=23, custom_translation_table=table, optimize=False, verbose=False
        )
    model = made.model_proto
    add_functions(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, *inputs: Tensor) -> list[Tensor]:
    names = [value.name for value in model.graph.input]
    outputs = session(model).run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))
    return [torch.from_numpy(np.asarray(output)) for output in outputs]


def judged(y: Tensor, experts: Tensor, x: Tensor, call: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Values within eager's budget, each against float64 with its own experts; experts up to what rounding excuses."""
    call = tuple(value.detach() if isinstance(value, Tensor) else value for value in call)
    eager, eager_experts = rule(x.to(dtype), *call)
    wide = [value.double() if isinstance(value, Tensor) else value for value in call]
    router_weight, router_bias, selection_bias, _, score, n_group, topk_group, group_score = wide[:8]
    logits = nn.functional.linear(x.to(dtype).double(), router_weight, router_bias)

    def with_experts(chosen: Tensor) -> Tensor:
        weights = weights_of(logits, chosen, score, *wide[8:11])
        routed = run_experts(x.to(dtype).double(), chosen, weights, *wide[12:20])
        shared = rule(x.to(dtype).double(), *wide)[0]
        weights64, experts64 = route(logits, *wide[2:11])
        return routed + shared - run_experts(x.to(dtype).double(), experts64, weights64, *wide[12:20])

    y, eager = y.to(dtype), eager.to(dtype)
    assert_within_budget(
        y, eager=eager, exact=with_experts(experts), exact_eager=with_experts(eager_experts), factor=3.0
    )
    if call[11] == "float32" and score != "softmax_after_topk" and len(x):
        scores = {"softmax": lambda t: t.softmax(-1), "sigmoid": Tensor.sigmoid}.get(score)
        if scores is None:
            return
        bias = 0 if selection_bias is None else selection_bias
        single = nn.functional.linear(x.to(dtype).float(), router_weight.float())
        verdict = routing_agreement(
            experts, eager_experts, exact_TE=scores(logits) + bias, eager_TE=scores(single) + bias, n_group=n_group,
            topk_group=topk_group, group_score=group_score,
        )  # fmt: skip
        assert verdict.ok, str(verdict)


def gate_call(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    experts, top_k, changes = SIZES[name]
    gate = GATES[name] | changes
    return moe_arguments(layer_of(small_config(n_routed_experts=experts, num_experts_per_tok=top_k, **gate), dtype))


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def gates(request):
    calls = {name: gate_call(name, request.param) for name in SIZES}
    return request.param, calls, exported(Layers(calls, request.param), (normal(5, 42, seed=1),))


@pytest.mark.parametrize("tokens", [0, 1, 5, 256])
def test_gates_agree_with_float64(gates, tokens):
    skip_without_tokens(tokens)
    dtype, calls, model = gates
    x = normal(tokens, 42, seed=tokens).to(dtype).float()
    outputs = run(model, x)
    for index, call in enumerate(calls.values()):
        assert outputs[2 * index + 1].dtype == torch.int64
        judged(outputs[2 * index], outputs[2 * index + 1], x, call, dtype)


def test_weights_stay_as_they_are(gates):
    """One node of ours a layer; each weight once, in torch's shape and dtype, and behind transB: no copy to fold."""
    dtype, calls, model = gates
    assert len(check_nodes(model)) == len(calls)
    given = [tuple(value.shape) for call in calls.values() for value in call if isinstance(value, Tensor)]
    tensors = [t for t in model.graph.initializer if len(t.dims) > 1]
    assert sorted(tuple(t.dims) for t in tensors) == sorted(shape for shape in given if len(shape) > 1)
    assert {t.data_type for t in tensors} == {NUMBERS[dtype]}
    assert "Transpose" not in {node.op_type for node in model.graph.node}
    assert all(any(a.name == "transB" for a in node.attribute) for node in model.graph.node if node.op_type == "Gemm")


def variants() -> dict[str, tuple[Any, ...]]:
    """What the three gates leave out, once each."""
    calls = {name.replace(" ", "_"): moe_arguments(layer_of(small_config(**GATES[name]))) for name in GATES}
    for name in SIZES:
        del calls[name]
    base = list(moe_arguments(layer_of(small_config())))
    gate_up, down = base[12], base[13]
    biases = normal(12, 54, seed=50), normal(12, 42, seed=51)
    oai = [*base]
    oai[1], oai[4] = normal(12, seed=52), "softmax_after_topk"
    oai[12:20] = [*in_layout(gate_up, down, "interleaved_transposed"), *biases, "swiglu_oai", 1.702, 0.9]
    oai[19], oai[20:] = "interleaved_transposed", [None, None, None]
    calls["oai"] = tuple(oai)
    ungated = [*base]
    ungated[12:20] = [*in_layout(gate_up, down, "ungated"), None, biases[1], "relu2", 1.0, 0.0, "ungated"]
    ungated[20:] = [weight(31, 42, seed=53), weight(42, 31, seed=54), None]
    calls["ungated"] = tuple(ungated)
    for activation in ("silu_clamped", "swiglu_oai", "gelu", "gelu_tanh", "relu"):
        gated = [*base]
        gated[16:20], gated[22] = [activation, 1.702, 0.9, "concat"], weight(1, 42, seed=55)
        calls[f"shared_{activation}"] = tuple(gated)
    return calls


def test_every_other_gate_activation_and_shared_expert():
    """All in one model, where layers differ and so have functions of their own."""
    calls = variants()
    model = exported(Layers(calls, torch.float32), (normal(5, 42, seed=1),))
    if len(model.functions) > 1:
        model = onnx.inliner.inline_local_functions(model)  # for ONNX Runtime before 1.27
    x = normal(64, 42, seed=2)
    outputs = run(model, x)
    for index, call in enumerate(calls.values()):
        judged(outputs[2 * index], outputs[2 * index + 1], x, call, torch.float32)


class Parts(nn.Module):
    """dsmoe::route alone, in bfloat16 too, and dsmoe::experts on what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.full((20,), -5.0))
        self.register_buffer("gate_up", weight(20, 54, 42, seed=60))
        self.register_buffer("down", weight(20, 42, 27, seed=61))
        self.register_buffer("bias", normal(20, 54, seed=62))

    def forward(self, logits: Tensor, x: Tensor) -> list[Tensor]:
        tight = (self.low, 4, "sigmoid", 5, 1, "top2", True, 1e-20, 2.5)
        weights, experts = torch.ops.dsmoe.route(logits, *tight)
        half = torch.ops.dsmoe.route(logits.bfloat16(), None, 4, "softmax", 5, 2, "max", True, 1e-20, 1.5)
        soft = torch.ops.dsmoe.route(logits, None, 4, "sqrtsoftplus", 1, 1, "max", False, 0.0, 1.0)
        weighed = (experts, weights, self.gate_up, self.down, self.bias, None)
        y = torch.ops.dsmoe.experts(x, *weighed, "silu", 1.0, 0.0, "concat")
        return [weights, experts, *half, *soft, y]


def test_ties_nan_and_groups_without_enough_experts():
    """Lowest index first. Each token has one group of four experts, K = 4, and scores that are all negative: a limit of
    groups that puts 0 in place of the scores it masks would choose the masked."""
    logits = torch.randn(12, 20, generator=torch.Generator().manual_seed(4)).mul(2).bfloat16().float()
    logits[0], logits[1, 4:12] = 0.0, 7.0
    logits[2, 6], logits[3] = torch.nan, torch.nan
    logits[4, 3], logits[5, :10], logits[6] = torch.inf, -torch.inf, -30.0
    x = normal(12, 42, seed=6)
    model = exported(Parts(), (logits, x))
    outputs, expected = run(model, logits, x), Parts()(logits, x)
    for index in (1, 3, 5):
        assert torch.equal(outputs[index], expected[index]), index
        assert all(len(set(row.tolist())) == 4 for row in outputs[index])
    assert outputs[1][0].tolist() == [0, 1, 2, 3]
    assert (outputs[1] // 4 == outputs[1][:, :1] // 4).all()  # one group
    for index in (0, 2, 4):  # relative: small weights are as accurate as large ones
        torch.testing.assert_close(outputs[index], expected[index], equal_nan=True, rtol=2e-6, atol=0)
    lost = expected[6].isnan().any(1)
    assert torch.equal(outputs[6].isnan().any(1), lost)
    assert row_error(outputs[6][~lost], expected[6][~lost]).max() < 16 * torch.finfo(torch.float32).eps
    assert outputs[0][6].min() > 0  # equal scores of 1e-13, which a plain Sigmoid rounds to 0
    assert outputs[4][6].min() > 0  # sqrt(log(1 + exp(-30))), which a plain Softplus rounds to 0


def test_native_multiplies_shared_experts_in_their_dtype():
    call = gate_call("v1", torch.bfloat16)
    model = exported(Layers({"v1": call}, torch.bfloat16), (normal(5, 42, seed=1),), table=translations(native=True))
    typed = {t.name for t in model.graph.initializer if t.data_type == NUMBERS[torch.bfloat16]}
    direct = [node for node in model.graph.node if node.op_type == "Gemm" and node.input[1] in typed]
    assert len(direct) == 2
    assert [node.op_type for node in model.graph.node].count(OP_TYPE) == 1


class Wide(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return torch.ops.dsmoe.route(logits, None, 2, "softmax", 1, 1, "max", False, 0.0, 1.0)[0]


def test_float64_is_refused():
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as error:
        exported(Wide(), (normal(3, 8, seed=1, dtype=torch.float64),))
    chain, causes = error.value, []
    while chain is not None:
        causes.append(chain)
        chain = chain.__cause__
    assert any(isinstance(cause, TargetError) and "float64" in str(cause) for cause in causes)
