"""A model that was compiled before is not compiled again, and nothing that could change its code goes unseen."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch_mlir")

import dsmoe_compiler as dsmoe
from dsmoe_compiler import api
from dsmoe_compiler.compiled import entries, key, reuse
from dsmoe_compiler.config import CompileConfig
from dsmoe_model import experts
from dsmoe_model.experts import RoutedExperts
from dsmoe_model.transformer import Transformer, build
from dsmoe_runtime.mlir.levels import LEVELS, best_level, cpu_flags
from tests.compiler.test_mlir_backend import SMALL

pytestmark = pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2")
CONFIG = CompileConfig(formats=("mlir",), max_seq_len=96)
FAST = replace(CONFIG, verify=False)
IDS = torch.arange(9)[None] * 7


def model(seed: int = 2) -> Transformer:
    return build(replace(SMALL, max_position_embeddings=96), seed=seed)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one compile, made once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSMOE_CACHE_DIR", str(folder))
        patch.delenv("DSMOE_COMPILE_CACHE", raising=False)
        artifact = dsmoe.compile(model(), config=FAST)
        artifact.save(folder / "artifact")
    return folder


@pytest.fixture
def cache(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(filled))
    monkeypatch.delenv("DSMOE_COMPILE_CACHE", raising=False)
    return filled / "compiled"


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("captured")

    monkeypatch.setattr(api.Capture, "phases", refuse)
    monkeypatch.setattr(api.Capture, "raise_layers", refuse)


@pytest.mark.usefixtures("no_capture")
def test_a_hit_is_the_same_artifact_and_is_proved(cache: Path, tmp_path: Path) -> None:
    artifact = dsmoe.compile(model(), config=CONFIG)
    assert artifact.manifest["from_cache"]
    assert artifact.manifest["verification"]["ok"]
    again, first = artifact.save(tmp_path / "again"), cache.parent / "artifact"
    names = {p.relative_to(first).as_posix() for p in first.rglob("*") if p.is_file()} - {"manifest.json"}
    assert names == {p.relative_to(again).as_posix() for p in again.rglob("*") if p.is_file()} - {"manifest.json"}
    for name in names:
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    tokens = [dsmoe.load(folder).generate(IDS, max_new_tokens=12) for folder in (again, first)]
    assert torch.equal(*tokens)


@pytest.mark.usefixtures("no_capture", "cache")
def test_other_weights_of_the_same_model_are_a_hit_with_their_own_values() -> None:
    other = model(seed=5)
    artifact = dsmoe.compile(other, config=FAST)
    assert artifact.manifest["from_cache"]
    with torch.no_grad():
        expected = other(IDS).logits_BSV[:, -1]
    runner = artifact.runner()
    logits, _ = runner.prefill(IDS, runner.new_cache())
    artifact.discard()
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


def key_of(transformer: Transformer, config: CompileConfig = FAST) -> str | None:
    return reuse.key_if_cached(transformer.eval(), config, 96)


def changed_config() -> str | None:
    return key_of(model(), replace(FAST, batch_size=2))


def changed_attribute() -> str | None:
    other = model()
    other.norm.eps *= 2
    return key_of(other)


def changed_structure() -> str | None:
    return key_of(build(replace(SMALL, max_position_embeddings=96, num_experts_per_tok=1), seed=2))


def changed_shape() -> str | None:
    other = model()
    other.lm_head.weight = torch.nn.Parameter(torch.zeros(SMALL.vocab_size + 1, SMALL.hidden_size))
    return key_of(other)


def changed_tie() -> str | None:
    other = model()
    other.lm_head.weight = other.embed_tokens.weight
    return key_of(other)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("change", [changed_config, changed_attribute, changed_structure, changed_shape, changed_tie])
def test_a_change_of_the_model_or_the_question_misses(change: Callable[[], str | None], cache: Path) -> None:
    known = key_of(model())
    assert known is not None
    assert (cache / known).is_dir()
    assert change() not in (known, None)


@pytest.mark.usefixtures("cache")
def test_a_change_of_code_or_of_a_version_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    known = key_of(model())
    plain = RoutedExperts.forward
    with monkeypatch.context() as patch:
        patch.setattr(RoutedExperts, "forward", lambda self, x, w, e: plain(self, x, w, e) * 2)
        assert key_of(model()) not in (known, None)
    with monkeypatch.context() as patch:  # a function that a method names, not the method itself
        patch.setattr(experts, "activation", lambda gate, up, config: gate * up)
        assert key_of(model()) not in (known, None)
    with monkeypatch.context() as patch:
        patch.setattr(key, "version", lambda _: "0.0")
        assert key_of(model()) not in (known, None)
    with monkeypatch.context() as patch:
        patch.setattr(key, "sources", lambda: "other")
        assert key_of(model()) not in (known, None)
    assert key_of(model()) == known


def with_hook(transformer: Transformer) -> None:
    transformer.layers[0].mlp.register_forward_hook(lambda *_: None)


def with_own_forward(transformer: Transformer) -> None:
    transformer.norm.forward = lambda x: x  # type: ignore[method-assign]


def with_parametrization(transformer: Transformer) -> None:
    torch.nn.utils.parametrizations.weight_norm(transformer.lm_head)


def with_strange_attribute(transformer: Transformer) -> None:
    transformer.layers[1].helper = object()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (with_hook, "layers.0.mlp has hooks"),
        (with_own_forward, "norm has a forward of its own"),
        (with_parametrization, "lm_head has parametrizations"),
        (with_strange_attribute, "layers.1.helper is a object"),
    ],
)
def test_what_cannot_be_told_is_not_cached_and_says_so(
    make: Callable[[Transformer], None], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = model()
    make(other)
    with caplog.at_level(logging.INFO, logger="dsmoe_compiler"):
        assert key_of(other) is None
    assert said in caplog.text


@pytest.mark.parametrize("name", ["entry.json", "model.json", f"objects/prefill_{best_level().name}.o"])
def test_a_damaged_entry_is_named_and_made_anew(cache: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    known = key_of(model())
    assert known is not None
    file = cache / known / name
    file.write_bytes(file.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING, logger="dsmoe_compiler"):
        artifact = dsmoe.compile(model(), config=FAST)
    artifact.discard()
    assert str(file) in caplog.text
    assert "from_cache" not in artifact.manifest
    again = dsmoe.compile(model(), config=FAST)
    again.discard()
    assert again.manifest["from_cache"]


def test_an_entry_that_is_not_the_model_is_found_by_the_proof_and_made_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if a key did not tell all: the weights of an entry are joined the wrong way round."""
    plain, wrong = reuse.build, []

    def swapped(made: list, owner: Transformer) -> torch.Tensor:
        if made[1] is not None and not wrong:
            wrong.append(made)
            return plain([made[0][::-1], made[1]], owner)
        return plain(made, owner)

    monkeypatch.setattr(reuse, "build", swapped)
    with caplog.at_level(logging.WARNING, logger="dsmoe_compiler"):
        artifact = dsmoe.compile(model(), config=CONFIG)
    artifact.discard()
    assert wrong
    assert "is not the model" in caplog.text
    assert artifact.manifest["verification"]["ok"]
    assert "from_cache" not in artifact.manifest


def test_zero_turns_it_off(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("DSMOE_COMPILE_CACHE", "0")
    assert key_of(model()) is None
    monkeypatch.setenv("DSMOE_COMPILE_CACHE", "much")
    assert key_of(model()) is None
    assert "'much'" in caplog.text
    assert list(cache.iterdir())


def test_the_oldest_go_when_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("DSMOE_COMPILE_CACHE", "1")
    source = tmp_path / "source"
    source.mkdir()
    (source / "code.o").write_bytes(bytes(400_000))
    for age, name in enumerate(("a", "b", "c")):
        entries.write(name, {"name": name}, ["code.o"], source)
        if (tmp_path / "compiled" / name).exists():
            os.utime(tmp_path / "compiled" / name, (1e9 + age, 1e9 + age))
    assert sorted(p.name for p in (tmp_path / "compiled").iterdir()) == ["b", "c"]
    (tmp_path / "into").mkdir()
    assert entries.read("c", tmp_path / "into") == {"name": "c"}
    assert (tmp_path / "into" / "code.o").stat().st_size == 400_000


def test_a_folder_that_others_may_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(tmp_path))
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled").chmod(0o777)
    assert entries.folder() is None
    assert "others than you" in caplog.text


def test_a_table_of_tuned_tiles_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(tmp_path))
    before = key.machine(CompileConfig(target="cpu"))
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "h200_132_bfloat16_triton3.6.json").write_text("{}")
    assert key.machine(CompileConfig(target="cpu")) != before


def test_a_compile_without_its_library_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(tmp_path))
    built = reuse.Built({}, {"mlir": {"library": {"missing": "no C compiler"}}}, None, [])
    capture: Any = None  # it is not looked at
    reuse.keep("key", built, capture, tmp_path, [])
    assert not list(tmp_path.rglob("entry.json"))
