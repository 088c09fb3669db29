"""`dsmoe compare` and `dsmoe explain`: what they print and write, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsmoe_compiler import compare as comparison
from dsmoe_compiler.cli import main
from dsmoe_compiler.cli.compare import AGAINST
from dsmoe_model.presets import PRESETS
from dsmoe_passes import pipeline

TINY = "deepseek-moe-tiny"
MOE_LAYERS = ["layers.1.mlp", "layers.2.mlp", "layers.3.mlp"]


def test_the_names_to_compare_with_are_the_driver_s() -> None:
    assert set(AGAINST) == {*comparison.AGAINST, "hf"}


def test_a_result_that_could_not_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", TINY, "--report", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_lengths_that_do_not_fit_are_refused_before_compiling(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", TINY, "--tokens", "4096", "--against", "eager"]) == 2
    error = capsys.readouterr().err
    assert "4096" in error
    assert str(PRESETS[TINY].max_position_embeddings) in error


@pytest.mark.slow
def test_explain_names_every_layer_and_shows_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", TINY, "--strict", "--stage", "fuse_moe"]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 MoE layers fused" in out
    assert all(name in out for name in MOE_LAYERS)
    assert all(step.__name__ in out for step in pipeline.PIPELINE)
    before, after = out.partition("# decode, before fuse_moe")[2].split("# decode, after fuse_moe")
    assert "torch.ops.dsmoe.experts.default" in before
    assert "torch.ops.dsmoe.moe.default" not in before
    assert after.count("torch.ops.dsmoe.moe.default") == 3


@pytest.mark.slow
def test_explain_strict_exits_1_for_a_layer_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 44: the layer is named with the reason, and --strict makes it an error."""
    monkeypatch.setattr("dsmoe_compiler.capture.why_not", lambda block, model: "a forward hook is registered on it")
    assert main(["explain", TINY, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [(layer["name"], layer["fused"]) for layer in layers] == [(name, False) for name in MOE_LAYERS]
    assert main(["explain", TINY, "--strict"]) == 1
    out, err = capsys.readouterr()
    assert "layers.1.mlp: a forward hook is registered on it" in out
    assert "0 of 3 MoE layers fused" in out
    assert "layers.1.mlp, layers.2.mlp, layers.3.mlp" in err


@pytest.mark.slow
def test_compare_writes_table_json_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, facts = tmp_path / "a ü" / "report.html", tmp_path / "a ü" / "facts.json"
    options = ("--against", "eager", "--tokens", "1,5", "--decode-steps", "2", "--repeats", "1")
    assert main(["compare", TINY, *options, "--report", str(report), "--json", str(facts)]) == 0
    out = capsys.readouterr().out
    assert "agrees" in out
    assert "prefill of 5 tokens" in out
    found = json.loads(facts.read_text())
    assert found["ok"]
    assert {candidate["name"] for candidate in found["candidates"]} == {"eager", "dsmoe"}
    assert "<script" not in report.read_text()
    assert sorted(path.name for path in report.parent.iterdir()) == ["facts.json", "report.html"]
