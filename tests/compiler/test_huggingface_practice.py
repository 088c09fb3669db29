"""What makes compiled models wrong in practice: each is fused and right, or left alone and said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmoe_compiler import backend
from dsmoe_compiler.explanation import Explanation
from dsmoe_compiler.huggingface import traces_eager_experts
from dsmoe_compiler.huggingface.explaining import explained_call
from dsmoe_runtime.errors import NotFusedError

pytest.importorskip("transformers")
from tests.passes.hf_models import FAMILIES, prompt, tiny

MOE, EXPERTS = "dsmoe::moe", "dsmoe::experts"


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> object:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


def near(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm())


class Blocks(nn.Module):
    """The mixture-of-experts blocks of a tiny model, one after the other: what is tested here, without attention."""

    def __init__(self, family: str = "qwen3_moe", **changes: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layer.mlp for layer in tiny(family, **changes).model.layers)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = nn.functional.layer_norm(x + block(x), x.shape[-1:])
        return x


def hidden() -> Tensor:
    return torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2))


def compared(model: nn.Module) -> Explanation:
    """The same call in eager and as the passes left it, without gradients: equal up to rounding."""
    with torch.no_grad():
        theirs = model(hidden())
        explanation, ours = explained_call(model, (hidden(),), run=True)
    assert near(ours, theirs)
    return explanation


def gradients_of(model: nn.Module, call: Any) -> dict[str, Tensor]:
    """Gradients of the loss that `call` returns; random numbers start at the same seed every time."""
    model.zero_grad()
    torch.manual_seed(3)
    call().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert near(ours[name], gradient), name


def trained(model: nn.Module, loss: Any, **named: Any) -> Explanation:
    """One step in eager and as the passes left it: the same gradients. Inputs are fresh: jitter writes into them."""
    found = []

    def compiled() -> Tensor:
        explanation, output = explained_call(model, named or (hidden(),), run=True)
        found.append(explanation)
        return loss(output)

    theirs = gradients_of(model, lambda: loss(model(**named) if named else model(hidden())))
    same_gradients(gradients_of(model, compiled), theirs)
    return found[0]


def operators(explanation: Explanation) -> list[str | None]:
    return [layer.operator for layer in explanation.layers]


def test_hooks_on_experts_run_around_the_operator() -> None:
    model, seen = Blocks(), []
    experts_of(model)[0].register_forward_hook(lambda _module, _args, out: 2 * out)
    experts_of(model)[1].register_forward_hook(lambda *_: seen.append(1))
    assert operators(compared(model)) == [MOE, MOE]
    assert len(seen) == 2  # once in eager, once compiled


def test_a_hook_that_changes_what_experts_read_keeps_the_gate_apart() -> None:
    model = Blocks()
    experts_of(model)[0].register_forward_pre_hook(lambda _module, args: (2 * args[0], *args[1:]))
    explanation = compared(model)
    assert operators(explanation) == [EXPERTS, MOE]
    assert "the gate reads" in (explanation.layers[0].reason or "")
    assert explanation.layers[0].advice == "Gate and experts run as two operators"


class LowRank(nn.Module):
    """What an adapter does to a stacked weight: `W + B A` for every expert."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        count, rows, columns = weight.shape
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(count, 2, columns, generator=generator) / columns**0.5)
        self.b = nn.Parameter(torch.randn(count, rows, 2, generator=generator))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def squared(output: Tensor) -> Tensor:
    return output[..., 0].square().sum()


def test_adapters_on_experts_leave_that_layer_alone_and_train() -> None:
    model = Blocks()
    adapted = experts_of(model)[0]
    nn.utils.parametrize.register_parametrization(adapted, "gate_up_proj", LowRank(adapted.gate_up_proj))
    explanation = trained(model, squared)
    assert [layer.fused for layer in explanation.layers] == [False, True]
    assert "computed in the graph" in (explanation.layers[0].reason or "")


def test_experts_tied_between_layers_are_fused_on_the_one_tensor() -> None:
    model = Blocks()
    first, second = experts_of(model)
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    explanation = trained(model, squared)
    assert operators(explanation) == [MOE, MOE]
    assert {layer.weights for layer in explanation.layers} == {"shared with the model"}


def test_router_jitter_in_training_draws_eagers_numbers() -> None:
    model = Blocks("mixtral", router_jitter_noise=0.1).train()
    assert operators(trained(model, squared)) == [MOE, MOE]


def test_router_logits_are_given_out_and_the_gate_stays_apart() -> None:
    model = tiny("qwen3_moe", num_hidden_layers=1)
    asked = {"input_ids": prompt(), "use_cache": False, "output_router_logits": True}
    with torch.no_grad():
        theirs = model(**asked)
        explanation, ours = explained_call(model, asked, run=True)
    assert operators(explanation) == [EXPERTS]
    assert "the logits have another user" in (explanation.layers[0].reason or "")
    assert near(ours.logits, theirs.logits)
    assert near(ours.router_logits[0], theirs.router_logits[0])
    assert near(ours.aux_loss, theirs.aux_loss)


def test_checkpointed_layers_are_fused_one_by_one() -> None:
    model = tiny("qwen3_moe").train()
    model.gradient_checkpointing_enable()
    explanation = trained(model, lambda out: out.loss, input_ids=prompt(), labels=prompt(), use_cache=False)
    assert operators(explanation) == [MOE, MOE]


def fusing(seen: list[Any]) -> Any:
    """A back end that runs graphs as the passes left them, and what it did."""

    @traces_eager_experts
    def fuse(gm: torch.fx.GraphModule, inputs: list) -> Any:
        graph, explanation = backend.fuse(gm, inputs)
        seen.append(explanation)
        return graph.forward

    return fuse


@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_generate_gives_eagers_tokens_for_a_left_padded_batch(cache: str) -> None:
    model, seen = tiny("qwen3_moe", num_hidden_layers=1), []
    mask = torch.ones_like(prompt())
    mask[1, :2] = 0
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    theirs = model.generate(
        prompt(), cache_implementation=cache, return_dict_in_generate=True, output_logits=True, **asked
    )

    model.forward = torch.compile(model.forward, backend=fusing(seen))
    ours = model.generate(
        prompt(), cache_implementation=cache, return_dict_in_generate=True, output_logits=True, **asked
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    assert near(torch.stack(ours.logits), torch.stack(theirs.logits))
    assert len(seen) >= 2  # prefill and decode
    assert all(operators(explanation) == [MOE] for explanation in seen)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_eagers_tokens_for_64_steps(family: str, spelling: str) -> None:
    """Every graph of the run with its layers fused; batched_mm and the eager loop beside the default."""
    torch._dynamo.reset()  # all models of a family share code, and Dynamo compiles that for a few of them only
    model, seen = tiny(family, experts_implementation=spelling), []
    asked = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(prompt(), **asked)

    model.forward = torch.compile(model.forward, backend=fusing(seen))
    assert torch.equal(model.generate(prompt(), **asked), theirs)
    layers = [layer for explanation in seen for layer in explanation.layers]
    assert len(layers) >= 4  # two of prefill, two of decode
    assert all(layer.fused for layer in layers), [str(layer) for layer in layers if not layer.fused]


def test_a_graph_that_torch_cannot_write_above_autograd_is_left_whole_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise AssertionError("an operator of higher order")

    monkeypatch.setattr(backend, "functional", fails)
    with torch.no_grad():
        model, x = Blocks(), hidden()
        explanation, ours = explained_call(model, (x,), run=True)
        assert near(ours, model(x))
    assert [layer.fused for layer in explanation.layers] == [False, False]
    assert "left to Inductor as a whole" in explanation.notes[0]
    with pytest.raises(NotFusedError, match="an operator of higher order"):
        backend.report(explanation.__class__((), (), notes=explanation.notes), strict=True)
    assert any("left to Inductor as a whole" in record.message for record in caplog.records)


def test_a_graph_with_vmap_is_left_whole_and_runs() -> None:
    """Masks that are made by vmap: torch's trace fails in it and left its level open, and Dynamo's guards failed."""

    class Mapped(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.vmap(lambda row: row + row.new_ones(()))(x))

    explanation = compared(Mapped())
    assert [layer.fused for layer in explanation.layers] == [False, False]
    assert all("left to Inductor as a whole" in (layer.reason or "") for layer in explanation.layers)


@pytest.mark.slow
def test_checkpointed_training_through_inductor() -> None:
    model = tiny("qwen3_moe").train()
    model.gradient_checkpointing_enable()
    fast = torch.compile(model, backend="dsmoe", options={"dsmoe.strict": True})
    asked = {"input_ids": prompt(), "labels": prompt(), "use_cache": False}
    theirs = gradients_of(model, lambda: model(**asked).loss)
    same_gradients(gradients_of(model, lambda: fast(**asked).loss), theirs)
    report = backend.last_report()
    assert report is not None
    assert operators(report) == [MOE, MOE]
