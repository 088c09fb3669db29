"""AOTInductor packages: the same numbers as eager, one set of weights, one kernel for layers that are alike."""

import json
import logging
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, fx

from dsmoe_compiler import artifact as artifacts
from dsmoe_compiler.capture import Capture
from dsmoe_compiler.phases import Phase
from dsmoe_compiler.runner import Runner
from dsmoe_compiler.staging import Stage
from dsmoe_compiler.targets import aoti
from dsmoe_compiler.targets.elf import EXECUTABLE, stack_flags
from dsmoe_model.attention import KVCache
from dsmoe_model.checkpoint import byte_tokenizer
from dsmoe_model.checkpoint.shards import read_header
from dsmoe_model.config import ModelConfig
from dsmoe_model.generation import generate
from dsmoe_model.transformer import Transformer, build
from dsmoe_runtime.agreement import assert_within_budget
from dsmoe_runtime.errors import TargetError

CONFIG = ModelConfig(
    vocab_size=260,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    max_position_embeddings=64,
    n_routed_experts=7,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
    initializer_range=0.125,
    bos_token_id=256,
    eos_token_id=257,
)
BATCH, CAPACITY = 2, 24


def compiled(folder: Path, model: Transformer, dtype: str) -> Path:
    stage = Stage(folder)
    capture = Capture(model, batch=BATCH, capacity=CAPACITY)
    reports = aoti.package(capture.phases(), stage.path, target="cpu", progress=logging.info)
    made = artifacts.assemble(
        stage,
        reports,
        config=model.config.to_dict() | {"model_type": "deepseek"},
        tokenizer=byte_tokenizer(),
        target="cpu",
        dtype=dtype,
        batch_size=BATCH,
        capacity=CAPACITY,
        source="a test",
        facts={},
    )
    return made.save(folder)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Path]:
    """A model, and the folder of its artifact."""
    model = build(CONFIG, dtype=getattr(torch, request.param), seed=1)
    return model, compiled(tmp_path_factory.mktemp("aoti") / "out", model, request.param)


def prompt(length: int) -> Tensor:
    return torch.randint(0, 256, (BATCH, length), generator=torch.Generator().manual_seed(length))


def followed(model: Transformer, ids: Tensor, steps: Tensor, experts: list[list[Tensor]]) -> tuple[Tensor, KVCache]:
    """Logits `[B, N, V]` of a prefill and of each decoded step, with the experts of every call given."""
    cache = KVCache.zeros(CONFIG, BATCH, CAPACITY, model.lm_head.weight.dtype)
    rows = [model(ids, cache, last_only=True, experts=experts[0]).logits_BSV]
    for i in range(steps.shape[1]):
        place = torch.tensor([ids.shape[1] + i])
        rows.append(model(steps[:, i : i + 1], cache, place, experts=experts[i + 1]).logits_BSV)
    return torch.cat(rows, 1), cache


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 17, CAPACITY - 3])
@torch.no_grad()
def test_prefill_and_decode_are_as_close_to_float64_as_eager(pair: tuple[Transformer, Path], length: int) -> None:
    model, folder = pair
    runner = artifacts.load(folder)
    cache, steps = runner.new_cache(), prompt(3)
    calls = [runner.prefill(prompt(length), cache)]
    calls += [runner.decode(steps[:, i : i + 1], length + i, cache) for i in range(3)]
    chosen = [list(experts) for _, experts in calls]
    eager, eager_cache = followed(model, prompt(length), steps, chosen)
    exact_model = build(CONFIG, dtype=torch.float64, seed=1)
    exact_model.load_state_dict(model.state_dict())
    exact, exact_cache = followed(exact_model, prompt(length), steps, chosen)
    assert_within_budget(torch.stack([logits for logits, _ in calls], 1), eager=eager, exact=exact)
    written = slice(0, length + 3)
    for ours, theirs, truth in zip(cache.key, eager_cache.key, exact_cache.key, strict=True):
        assert_within_budget(ours[:, :, written], eager=theirs[:, :, written], exact=truth[:, :, written])
        assert not ours[:, :, length + 3 :].any(), "slots beyond the sequence stay as they were"


@pytest.mark.slow
def test_no_library_wants_an_executable_stack(pair: tuple[Transformer, Path], tmp_path: Path) -> None:
    """glibc 2.41 does not load such a one; Inductor makes nothing else."""
    for phase in ("prefill", "decode"):
        with zipfile.ZipFile(pair[1] / f"{phase}.pt2") as archive:
            (name,) = [n for n in archive.namelist() if n.endswith(".so")]
            flags = stack_flags(Path(archive.extract(name, tmp_path)))
        assert flags is not None
        assert not flags[1] & EXECUTABLE


@pytest.mark.slow
def test_a_new_process_generates_from_the_folder_alone(pair: tuple[Transformer, Path]) -> None:
    model, folder = pair
    code = """
import sys
from dsmoe_compiler.artifact import load
print(repr(load(sys.argv[1]).generate_text("caf\\u00e9", max_new_tokens=8)))
"""
    found = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    ids = torch.tensor([byte_tokenizer().encode("caf\u00e9")] * BATCH)
    said = generate(model, ids, max_new_tokens=8, eos_token_id=257)[0, ids.shape[1] :]
    assert found.stdout == repr(byte_tokenizer().decode(said.tolist())) + "\n"


@pytest.mark.slow
def test_repeats_threads_and_two_runners_give_the_same_bits(pair: tuple[Transformer, Path]) -> None:
    _, folder = pair
    runners = [artifacts.load(folder), artifacts.load(folder, check_weights=False)]

    def logits(runner: Runner) -> Tensor:
        cache = runner.new_cache()
        rows = [runner.prefill(prompt(9), cache)[0]]
        return torch.stack([*rows, *(runner.decode(prompt(1), 9 + i, cache)[0] for i in range(8))])

    alone, found = logits(runners[0]), []
    threads = [threading.Thread(target=lambda r=r: found.append(logits(r))) for r in runners * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, alone) for one in found)


@pytest.mark.slow
def test_both_phases_share_one_set_of_weights(pair: tuple[Transformer, Path]) -> None:
    model, folder = pair
    manifest = json.loads((folder / "manifest.json").read_text())
    stored = set(read_header(next((folder / "weights").iterdir())))
    prefill, decode = (set(manifest["phases"][name]["constants"].values()) for name in ("prefill", "decode"))
    assert prefill | decode == stored
    assert not any(name.startswith(("prefill.", "decode.")) for name in stored), "nothing is stored twice"
    size = sum(p.nbytes for p in model.parameters())
    assert (folder / "weights" / "model-00001-of-00001.safetensors").stat().st_size < 1.02 * size + 20_000
    assert all(report["bytes"] < 8 * 2**20 for report in manifest["phases"].values()), "weights are not in packages"
    assert all(report["operators"] == {"dsmoe::moe": 2} for report in manifest["phases"].values())


@pytest.mark.slow
def test_more_layers_need_no_more_kernels(tmp_path: Path) -> None:
    phases = []
    for layers in (4, 7):
        capture = Capture(build(replace(CONFIG, num_hidden_layers=layers)), batch=1, capacity=8)
        phase = next(capture.phases(("decode",)))
        phases.append(Phase(f"layers{layers}", phase.graph, phase.inputs))
    four, seven = aoti.package(phases, tmp_path, target="cpu", progress=logging.info).values()
    assert seven.kernels == four.kernels < four.launches < seven.launches
    assert [four.operators, seven.operators] == [{"dsmoe::moe": 3}, {"dsmoe::moe": 6}]


def phase_of(function: torch.nn.Module, x: Tensor) -> Phase:
    return Phase("prefill", torch.export.export(function, (x,)).module(check_guards=False), (x,))  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_cannot_be_compiled_is_said_in_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "no-such-compiler"))
    phase = phase_of(torch.nn.Linear(3, 3), torch.ones(2, 3))
    with pytest.raises(TargetError, match=r"AOTInductor, prefill failed: .*no-such-compiler"):
        aoti.package([phase], tmp_path, target="cpu", progress=logging.info)
    assert not list(tmp_path.glob(".build*"))


def test_a_weight_that_loading_would_misread_is_refused(tmp_path: Path) -> None:
    graph = fx.Graph()
    graph.output(graph.get_attr("w"))
    module = torch.nn.Module()
    module.register_buffer("w", torch.ones(3, 4).t())
    phase = Phase("decode", fx.GraphModule(module, graph), ())
    with pytest.raises(TargetError, match=r"decode: the weight 'w' .*strides \(1, 4\)\) cannot be stored"):
        aoti.write_weights({"decode": phase.graph}, tmp_path / "weights", progress=logging.info)


def test_an_option_that_this_torch_lacks_is_left_out_unless_nothing_works_without() -> None:
    known = {"aot_inductor.package": True, "compile_threads": 1}
    assert aoti.accepted(known | {"cpp.no_such_option": 1}) == known
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(aoti, "INDISPENSABLE", ("cpp.no_such_option",))
        with pytest.raises(TargetError, match=r"has no inductor option cpp\.no_such_option: use torch"):
            aoti.accepted({"cpp.no_such_option": 1})
