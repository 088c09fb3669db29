"""The mlir format: compiled, proved, published, loaded without torch-mlir; and the stages that lead there."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_mlir")

import dsmoe_compiler as dsmoe
from dsmoe_compiler.api import show_stage
from dsmoe_compiler.cli.main import main
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.targets.mlir.interface import Interface, formula
from dsmoe_model.transformer import build
from dsmoe_runtime.errors import ArtifactError, ConfigError
from dsmoe_runtime.mlir.levels import LEVELS, best_level, cpu_flags
from tests.compiler.test_mlir_backend import SMALL

pytestmark = pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2")
CONFIG = CompileConfig(formats=("mlir",), max_seq_len=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSMOE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "objects"))
        artifact = dsmoe.compile(build(replace(SMALL, max_position_embeddings=96), seed=2), config=CONFIG)
        return artifact.save(tmp_path_factory.mktemp("artifact") / "out")


def test_it_generates_what_eager_does_and_needs_no_torch_mlir(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlir", None)
    runner = dsmoe.load(folder)
    model = build(replace(SMALL, max_position_embeddings=96), seed=2)
    ids = torch.arange(9)[None] * 7
    ours = runner.generate(ids, max_new_tokens=30)
    rows = [ids]
    with torch.no_grad():
        for _ in range(30):
            rows.append(model(torch.cat(rows, dim=1)).logits_BSV[:, -1].argmax(-1, keepdim=True))
    assert torch.equal(ours, torch.cat(rows, dim=1))


def test_the_manifest_says_what_was_proved_and_what_it_takes_to_run(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["verification"]["ok"]
    assert manifest["processor"]["level"] in LEVELS
    assert "avx2" in manifest["processor"]["features"]
    assert manifest["mlir"]["phases"] == ["prefill", "decode"]
    level = manifest["mlir"]["levels"][0]
    assert {f"objects/prefill_{level}.o", f"objects/decode_{level}.o", "libmodel.so", "model.h"} <= {*manifest["files"]}


def test_the_interface_is_data_that_says_how_to_call_it(folder: Path) -> None:
    phases = json.loads((folder / "model.json").read_text())["phases"]
    prefill = Interface.from_dict(phases["prefill"]["interface"])
    assert prefill.entry == "prefill"
    assert Interface.from_dict(json.loads(json.dumps(prefill.to_dict()))) == prefill
    ids, *caches = [a for a in prefill.arguments if a.kind == "input"]
    assert (ids.name, ids.dtype) == ("ids", "int64")
    assert ids.shape == (1, prefill.free[0].name)
    assert len(caches) == 2 * SMALL.num_hidden_layers
    logits = prefill.arguments[prefill.results[0].argument]  # type: ignore[union-attr]
    assert (logits.kind, logits.shape[-1]) == ("output", SMALL.vocab_size)
    objects = phases["prefill"]["objects"]
    assert [*objects] == json.loads((folder / "manifest.json").read_text())["mlir"]["levels"]
    assert all(names[-1] == f"prefill_{level}" for level, names in objects.items())


def test_weights_are_mapped_and_not_read(folder: Path) -> None:
    runner = dsmoe.load(folder)
    place = runner._programs["decode"].weights["model.embed_tokens.weight"].data_ptr()  # type: ignore[attr-defined]
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    assert any(int(r[0].split("-")[0], 16) <= place < int(r[0].split("-")[1], 16) for r in ranges)


@pytest.mark.parametrize("name", ["objects/decode_LEVEL.o", "libmodel.so", "model.json"])
def test_what_was_altered_is_refused(folder: Path, name: str, tmp_path: Path) -> None:
    other = tmp_path / "copy"
    shutil.copytree(folder, other)
    name = name.replace("LEVEL", best_level().name)
    content = bytearray((other / name).read_bytes())
    content[len(content) // 2] ^= 1
    (other / name).write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="hash"):
        dsmoe.load(other)


def test_another_processor_is_refused_by_what_it_lacks(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "copy"
    shutil.copytree(folder, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["processor"]["features"].append("avx1024")
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="uses avx1024, which this CPU lacks"):
        dsmoe.load(other)


def test_sizes_are_arithmetic_and_nothing_else() -> None:
    assert formula("256*s27 + s3//2")({"s27": 3, "s3": 9}) == 772
    for bad in ("__import__('os')", "s27.real", "[1][0]", "1.5*s27", "s27 +"):
        with pytest.raises(ArtifactError, match="is no size"):
            formula(bad)


def test_format_mlir_is_for_the_cpu() -> None:
    with pytest.raises(ConfigError, match="format mlir is for target cpu; target is 'cuda'"):
        CompileConfig(formats=("mlir",), target="cuda")
    assert CompileConfig(formats=("mlir",)).target == "cpu"


@pytest.mark.parametrize(
    ("stage", "holds"),
    [("torch", "torch.aten.rsqrt"), ("linalg", "linalg.generic"), ("scheduled", "scf.for"), ("llvm", "llvm.func")],
)
def test_each_stage_can_be_seen(stage: str, holds: str) -> None:
    model = build(SMALL, seed=2)
    whole = show_stage(model, stage=stage)
    one = show_stage(model, stage=stage, layer=0)
    assert holds in whole.text
    assert len(one.text) < len(whole.text)
    assert "capture" in whole.seconds
    assert stage in whole.seconds


def test_a_layer_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'model\.layers\.9'; there are model\.layers\.0, model\.layers\.1"):
        show_stage(build(SMALL, seed=2), stage="torch", layer=9)


def test_stages_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "deepseek-moe-tiny", "--target", "cpu", "--stage", "linalg", "--layer", "2"]) == 0
    assert "linalg.generic" in capsys.readouterr().out
    assert main(["explain", "deepseek-moe-tiny", "--target", "cpu", "--stage", "fuse_moe"]) == 2
    assert main(["explain", "deepseek-moe-tiny", "--stage", "linalg", "--layer", "2"]) == 2


def test_generation_stops_at_the_capacity(folder: Path) -> None:
    runner = dsmoe.load(folder)
    out = runner.generate(torch.zeros(1, 90, dtype=torch.int64), max_new_tokens=6)
    assert out.shape == (1, 96)


def test_an_artifact_runs_on_processors_without_avx512_unless_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dsmoe_compiler.targets.mlir import packaging

    assert [level.name for level in packaging.chosen(None)] == sorted({"avx2", best_level().name})
    monkeypatch.setattr(packaging, "best_level", lambda: LEVELS["avx512"])
    assert [level.name for level in packaging.chosen(None)] == ["avx2", "avx512"]
    assert [level.name for level in packaging.chosen(("avx512",))] == ["avx512"]
