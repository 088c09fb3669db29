"""`dsmoe` among the experts implementations of transformers: right numbers, errors by name, gone without a trace."""

from __future__ import annotations

import copy
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dsmoe_compiler as dsmoe
from dsmoe_compiler.huggingface.experts import plan
from dsmoe_compiler.huggingface.family_models import build
from dsmoe_runtime.agreement import assert_within_budget
from dsmoe_runtime.errors import ConfigError
from tests.passes.hf_models import prompt, tiny

moe = pytest.importorskip("transformers.integrations.moe")
REGISTRY = moe.ALL_EXPERTS_FUNCTIONS


@pytest.fixture(autouse=True)
def _registry_is_left_as_it_was() -> object:
    before = dict(REGISTRY)
    yield
    assert dict(REGISTRY) == before
    torch._dynamo.reset()


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


class Calls(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.flatten(0, 1)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "gpt_oss", "nemotron_h"]
)  # concat; interleaved, transposed, bias; no gate
def test_eager_numbers(family: str) -> None:
    model, ids = build(family), prompt()
    model.set_experts_implementation("eager")  # type: ignore[operator]
    eager, exact = logits(model, ids), logits(copy.deepcopy(model).double(), ids)
    with dsmoe.use_experts(model):
        assert model.config._experts_implementation == "dsmoe"  # type: ignore[union-attr]
        with Calls() as calls:
            ours = logits(model, ids)
        assert calls.names.count("dsmoe.experts.default") == len(experts_of(model))
    assert model.config._experts_implementation == "eager"  # type: ignore[union-attr]
    assert_within_budget(ours, eager=eager, exact=exact)


def test_importing_registers_nothing_and_removing_leaves_nothing() -> None:
    assert "dsmoe" not in REGISTRY
    with dsmoe.register_experts() as first:
        assert "dsmoe" in REGISTRY
        dsmoe.register_experts().remove()
        assert "dsmoe" in REGISTRY  # the second did not put it there
        first.remove()
        first.remove()
    assert "dsmoe" not in REGISTRY


def test_a_name_that_is_taken_is_refused() -> None:
    REGISTRY["dsmoe"] = print
    try:
        with pytest.raises(ConfigError, match="which is not ours"):
            dsmoe.register_experts()
    finally:
        del REGISTRY["dsmoe"]


def test_gradients_are_eagers() -> None:
    model, ids = tiny("qwen3_moe", experts_implementation="eager"), prompt()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    theirs = gradients()
    with dsmoe.use_experts(model):
        ours = gradients()
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_generate_gives_eagers_tokens() -> None:
    model, ids = tiny("mixtral", experts_implementation="eager"), prompt()
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(ids, **asked)
    with dsmoe.use_experts(model):
        assert torch.equal(model.generate(ids, **asked), theirs)


def test_under_compile_and_export_it_is_one_operator_a_layer() -> None:
    model, ids = tiny("qwen3_moe", num_hidden_layers=1), prompt()
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: list) -> object:
        graphs.append(gm)
        return gm.forward

    with dsmoe.use_experts(model), torch.no_grad():
        eager = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend=keep, fullgraph=True)(ids, use_cache=False).logits
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        exported = program.module()(ids, use_cache=False).logits
    assert torch.equal(compiled, eager)
    assert torch.equal(exported, eager)
    graphs.append(program.graph_module)
    assert [sum("dsmoe" in str(node.target) for node in gm.graph.nodes) for gm in graphs] == [1, 1]


def test_what_the_operator_cannot_express_is_an_error_that_names_it() -> None:
    model = tiny("qwen3_moe")
    before = model.config._experts_implementation
    experts_of(model)[1].has_post_expert_norm = True  # type: ignore[assignment]
    reason = r"model\.layers\.1\.mlp\.experts: .*Qwen3MoeExperts: it normalises each expert's output.*grouped_mm"
    with pytest.raises(ConfigError, match=reason), dsmoe.use_experts(model):
        pass
    assert model.config._experts_implementation == before
    with dsmoe.register_experts():  # by hand, without the check of the whole model: the first call says it
        model.set_experts_implementation("dsmoe")
        with pytest.raises(ConfigError, match="it normalises each expert's output"):
            model(prompt())


@pytest.mark.parametrize(
    ("gate", "because"),
    [
        (lambda self, h: h.chunk(2, -1)[0] * self.act_fn(h.chunk(2, -1)[1]), "up lies before gate"),
        (lambda self, h: torch.tanh(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1], "the activation is none of"),
    ],
)
def test_another_activation_is_refused_and_never_replaced(
    gate: object, because: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen3_moe")
    monkeypatch.setattr(type(experts_of(model)[0]), "_apply_gate", gate)
    with pytest.raises(ConfigError, match=because), dsmoe.use_experts(model):
        pass


def test_a_changed_setting_is_another_activation() -> None:
    module = experts_of(tiny("gpt_oss"))[0]
    assert plan(module) == ("swiglu_oai", 1.702, 7.0, "interleaved_transposed")
    module.limit = 3.0  # type: ignore[assignment]
    assert plan(module) == ("swiglu_oai", 1.702, 3.0, "interleaved_transposed")


def test_a_model_without_such_experts_is_refused_with_the_other_way() -> None:
    with (
        pytest.raises(ConfigError, match=r"no experts on transformers.* torch\.compile"),
        dsmoe.use_experts(nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.parametrize("found", ["5.16.2", "5.24.0"])
def test_a_release_outside_the_range_is_refused_with_both_versions(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: found)
    with pytest.raises(ConfigError, match=rf"transformers is {found}; .*transformers>=5\.17,<5\.24"):
        dsmoe.register_experts()
