"""A folder that transformers reads, to an artifact: refused, explained, captured, proved; packaged in a slow test."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import dsmoe_compiler as dsmoe
from dsmoe_compiler.cli.main import main
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.huggingface.compiling import PretrainedCapture
from dsmoe_compiler.huggingface.folder import Pretrained, is_for_transformers, load_folder, structure_of
from dsmoe_compiler.huggingface.phases import cache_shapes, empty_cache
from dsmoe_compiler.huggingface.proof import prove
from dsmoe_model.attention import KVCache
from dsmoe_runtime.errors import CheckpointError, ConfigError, NotFusedError

pytest.importorskip("transformers")
from tests.passes.hf_models import FAMILIES, tiny

CAPACITY = 24
GENERATING = [family for family in FAMILIES if family != "deepseek_ocr2"]  # that one wants pictures


class Graphs:
    """A runner of captured graphs, as an artifact's is of packages."""

    batch_size, capacity = 1, CAPACITY

    def __init__(self, pretrained: Pretrained) -> None:
        self.pretrained = pretrained
        self.shapes = cache_shapes(pretrained, batch=1, capacity=CAPACITY)
        self.capture = PretrainedCapture(pretrained, self.shapes, progress=lambda _: None)
        self.programs = {phase.name: phase.graph for phase in self.capture.phases()}

    def new_cache(self) -> KVCache:
        return empty_cache(self.shapes, self.pretrained.dtype, "cpu")

    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: KVCache) -> Any:
        return self.programs["prefill"](ids, cache.key, cache.value)

    @torch.no_grad()
    def decode(self, ids: Tensor, position: int, cache: KVCache) -> Any:
        return self.programs["decode"](ids, torch.tensor([position]), cache.key, cache.value)


def verdict(runner: Graphs) -> Any:
    config = CompileConfig(target="cpu")
    return prove(runner.pretrained, runner, runner.shapes, runner.capture.sizes, config=config, progress=lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("qwen3_moe").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


CHEAP = ("deepseek_v3", "qwen2_moe", "gpt_oss")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=() if family in CHEAP and dtype == torch.float32 else pytest.mark.slow)
        for family in GENERATING
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_captured_fused_and_proved(family: str, dtype: torch.dtype) -> None:
    runner = Graphs(Pretrained(tiny(family, dtype=dtype), None, family, ()))
    layers = runner.capture.explanation().layers
    assert [layer.fused for layer in layers] == [True, True], [layer.reason for layer in layers]
    assert len(runner.capture.sizes) == 2
    found = verdict(runner)
    assert found.ok, str(found)


def swap_experts(graph: fx.GraphModule) -> None:
    """Expert 0 answers for 1, and the other way round, in the last layer."""
    for node in operators(graph)[-1:]:
        weight = stacked(graph, node)
        weight[[0, 1]] = weight[[1, 0]]


def scale_weights(graph: fx.GraphModule) -> None:
    for node in operators(graph)[:1]:
        stacked(graph, node).mul_(1.02)


def other_gate(graph: fx.GraphModule) -> None:
    for node in operators(graph)[:1]:
        if node.target is torch.ops.dsmoe.moe.default:
            at = 4
        else:
            node, at = node.args[1].args[0], 2
        node.args = (*node.args[:at], node.args[at], "sigmoid", *node.args[at + 2 :])
    graph.recompile()


def stale_cache(graph: fx.GraphModule) -> None:
    """Keys are not written."""
    writes = [n for n in graph.graph.nodes if "index_copy" in str(n.target) or "copy_" in str(n.target)]
    write = writes[0]
    if write.users:
        write.replace_all_uses_with(write.args[0])
    graph.graph.erase_node(write)
    graph.recompile()


def operators(graph: fx.GraphModule) -> list[fx.Node]:
    wanted = (torch.ops.dsmoe.moe.default, torch.ops.dsmoe.experts.default)
    return [node for node in graph.graph.nodes if node.target in wanted]


def stacked(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """The down projections of one operator, which the eager model does not see change."""
    at = 14 if node.target is torch.ops.dsmoe.moe.default else 4
    place = node.args[at]
    weight = graph.get_parameter(str(place.target)).detach().clone()
    graph.register_buffer(f"faulty_{node.name}", weight)
    with graph.graph.inserting_before(node):
        other = graph.graph.get_attr(f"faulty_{node.name}")
    other.meta = dict(place.meta)
    node.args = (*node.args[:at], other, *node.args[at + 1 :])
    graph.recompile()
    return weight


@pytest.fixture(scope="module")
def qwen() -> Graphs:
    return Graphs(Pretrained(tiny("qwen3_moe"), None, "", ()))


@pytest.mark.parametrize("fault", [swap_experts, scale_weights, other_gate, stale_cache])
def test_a_planted_fault_is_found(qwen: Graphs, fault: Callable[[fx.GraphModule], None]) -> None:
    faulty = copy.copy(qwen)
    faulty.programs = {name: fx.GraphModule(g, copy.deepcopy(g.graph)) for name, g in qwen.programs.items()}
    for graph in faulty.programs.values():
        fault(graph)
    assert verdict(qwen).ok
    assert not verdict(faulty).ok


def test_the_eager_model_is_as_it_was() -> None:
    model = tiny("deepseek_v3", dtype=torch.bfloat16)
    before = {name: (t.dtype, t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    verdict(Graphs(Pretrained(model, None, "", ())))
    assert model.config._experts_implementation == "grouped_mm"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dtype == before[name][0]
        assert torch.equal(tensor, before[name][1]), name


def test_explained_without_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(folder.glob("*.safetensors")).unlink()
    assert is_for_transformers(folder)
    assert next(structure_of(folder).model.parameters()).is_meta
    assert main(["explain", str(folder), "--json", "--strict"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["name"] for layer in layers] == [f"model.layers.{i}.mlp" for i in range(2)]
    assert all(layer["fused"] for layer in layers)


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_are_refused(folder: Path) -> None:
    edited(folder, model_type="of_the_future", auto_map={"AutoModelForCausalLM": "code.Model"})
    with pytest.raises(
        ConfigError, match=r"no model_type 'of_the_future', and Python code in a checkpoint is never run"
    ):
        load_folder(folder)
    edited(folder, model_type="qwen3_moe", auto_map=None)
    with pytest.raises(ConfigError, match=r"cannot read its config\.json"):
        load_folder(folder)
    edited(folder, auto_map={}, num_hidden_layers=3, layer_types=None)
    with pytest.raises(CheckpointError, match=r"missing keys: model.layers.2"):
        load_folder(folder)
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"\.\./outside"):
        load_folder(folder)


def test_models_that_keep_more_than_keys_and_values_are_refused() -> None:
    import transformers

    config = transformers.CONFIG_MAPPING["lfm2_moe"](
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, num_dense_layers=0,
        layer_types=["conv", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigError, match=r"layer 0 of Lfm2MoeForCausalLM keeps a .*torch\.compile"):
        cache_shapes(Pretrained(model, None, "", ()), batch=1, capacity=8)


def test_strict_names_what_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from dsmoe_passes import pipeline

    monkeypatch.setattr(pipeline, "PIPELINE", pipeline.PIPELINE[:1])
    pretrained = Pretrained(tiny("qwen3_moe"), None, "", ())
    capture = PretrainedCapture(pretrained, cache_shapes(pretrained, batch=1, capacity=8), progress=lambda _: None)
    monkeypatch.setattr(pipeline.run, "__kwdefaults__", {**pipeline.run.__kwdefaults__, "passes": pipeline.PIPELINE})
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(NotFusedError, match=r"2 of 2 layers.*layers\.0\.mlp"),
    ):
        next(capture.phases(strict=True))
    assert "is left alone" in caplog.text


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    made = dsmoe.compile(tiny("deepseek_v3"), config=CompileConfig(target="cpu", max_seq_len=80, strict=True))
    return made.save(out)


@pytest.mark.slow
def test_an_artifact_generates_what_eager_does(artifact: Path) -> None:
    runner, model = dsmoe.load(artifact), tiny("deepseek_v3")
    ids = torch.tensor([[5, 17, 33, 8]])
    expected = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(runner.generate(ids, max_new_tokens=64), expected)
