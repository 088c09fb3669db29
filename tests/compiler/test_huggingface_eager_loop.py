"""transformers' eager loop reaches the back end whole; eager calls, other back ends and models stay as they were."""

from __future__ import annotations

import copy
import logging
import sys
from importlib import metadata

import pytest
import torch
from torch import fx, nn

from dsmoe_compiler.huggingface import eager_loop
from dsmoe_compiler.huggingface.eager_loop import MODULE, install, traceable_experts, uninstall
from dsmoe_compiler.huggingface.explaining import explained_call
from dsmoe_runtime.agreement import assert_within_budget
from tests.passes.hf_models import prompt, tiny

moe = pytest.importorskip(MODULE)


@pytest.fixture(autouse=True)
def _fresh() -> object:
    torch._dynamo.reset()
    for asked_once in (eager_loop._known, eager_loop._say):
        asked_once.cache_clear()
    install()
    yield
    torch._dynamo.reset()
    install()


@pytest.fixture
def model() -> nn.Module:
    return tiny("qwen3_moe", experts_implementation="eager", num_hidden_layers=1)


def chosen(implementation: str | None) -> object:
    """What an experts module would run now; its own loop is "loop"."""
    return moe.ALL_EXPERTS_FUNCTIONS.get_interface(implementation, "loop")


def test_one_graph_every_layer_fused_and_eagers_numbers(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    ids = prompt()
    with torch.no_grad(), caplog.at_level(logging.INFO, eager_loop.__name__):
        eager = model(ids, use_cache=False).logits
        exact = copy.deepcopy(model).double()(ids, use_cache=False).logits
        explanation, ours = explained_call(model, {"input_ids": ids, "use_cache": False}, run=True)
    assert [layer.operator for layer in explanation.layers] == ["dsmoe::moe"]
    assert not explanation.notes  # no graph break
    rows = [logits.flatten(0, 1) for logits in (ours.logits, eager, exact)]
    assert_within_budget(rows[0], eager=rows[1], exact=rows[2])
    assert [record.message for record in caplog.records if "'eager' is traced as 'grouped_mm'" in record.message]
    assert len(caplog.records) == 1
    assert model.config._experts_implementation == "eager"  # type: ignore[union-attr]


def test_an_eager_call_runs_the_loop_and_the_registry_is_as_it_was(model: nn.Module) -> None:
    assert chosen("eager") == "loop"
    assert chosen("grouped_mm") is moe.grouped_mm_experts_forward
    assert "eager" not in moe.ALL_EXPERTS_FUNCTIONS
    with pytest.raises(KeyError, match="not a valid experts implementation"):
        chosen("nonsense")


def test_another_back_end_sees_what_it_always_saw(model: nn.Module) -> None:
    graphs: list[fx.GraphModule] = []

    def other(gm: fx.GraphModule, _: list) -> object:
        graphs.append(gm)
        return gm.forward

    block, x = model.model.layers[0].mlp, torch.randn(1, 4, 32)  # type: ignore[union-attr, index]
    with torch.no_grad():
        eager = block(x)
        compiled = torch.compile(block, backend=other)(x)
    assert len(graphs) > 2  # the loop breaks the graph
    assert not any("grouped_mm" in str(node.target) for gm in graphs for node in gm.graph.nodes)
    assert torch.equal(compiled, eager)


def test_export_sees_the_traceable_spelling_inside_the_context_only(model: nn.Module) -> None:
    with torch.no_grad(), traceable_experts():
        program = torch.export.export(model, (prompt(),), {"use_cache": False}, strict=False)
    assert sum("grouped_mm" in str(node.target) for node in program.graph.nodes) == 2
    assert not eager_loop._exporting


def test_it_can_be_undone() -> None:
    uninstall()
    assert not hasattr(moe.ExpertsInterface.get_interface, "__wrapped__")
    uninstall()
    install()
    install()
    assert not hasattr(moe.ExpertsInterface.get_interface.__wrapped__, "__wrapped__")  # wrapped once


def test_without_transformers_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall()
    monkeypatch.delitem(sys.modules, MODULE)
    install()
    assert MODULE not in sys.modules


def test_a_release_outside_the_range_is_left_alone_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uninstall()
    monkeypatch.setattr(metadata, "version", lambda _: "5.24.1")
    install()
    install()
    assert not hasattr(moe.ExpertsInterface.get_interface, "__wrapped__")
    assert [record.message for record in caplog.records if "5.24.1" in record.message and "<5.24" in record.message]
    assert len(caplog.records) == 1


@pytest.mark.slow
def test_bare_torch_compile_through_inductor(model: nn.Module) -> None:
    from dsmoe_compiler import backend

    ids = prompt()
    fast = torch.compile(model, backend="dsmoe", options={"dsmoe.strict": True})
    with torch.no_grad():
        eager, ours = model(ids, use_cache=False).logits, fast(ids, use_cache=False).logits
    assert (ours - eager).norm() <= 1e-5 * eager.norm()
    report = backend.last_report()
    assert report is not None
    assert [layer.operator for layer in report.layers] == ["dsmoe::moe"]
