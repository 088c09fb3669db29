"""A preset's name or a folder becomes a model with its tokenizer."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsmoe_compiler.loading import load_model, progress_bar
from dsmoe_model.checkpoint import byte_tokenizer, save_checkpoint
from dsmoe_model.errors import CheckpointError
from dsmoe_model.presets import PRESETS
from dsmoe_model.transformer import build

TINY = replace(PRESETS["deepseek-moe-tiny"], hidden_size=32, num_hidden_layers=2, intermediate_size=48)


def test_preset_speaks_bytes_and_its_seed_decides() -> None:
    first, again, other = (load_model("deepseek-moe-tiny", seed=seed) for seed in (1, 1, 2))
    assert first.tokenizer is not None
    assert first.tokenizer.decode(first.tokenizer.encode("für")) == "für"
    assert first.config == PRESETS["deepseek-moe-tiny"]
    assert torch.equal(first.model.lm_head.weight, again.model.lm_head.weight)
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)
    assert any("random" in note for note in first.notes)


def test_folder_brings_weights_and_tokenizer(tmp_path: Path) -> None:
    model = build(TINY, seed=3, dtype=torch.bfloat16)
    folder = save_checkpoint(model, tmp_path / "a model", tokenizer=byte_tokenizer())
    seen: list[tuple[int, int]] = []
    loaded = load_model(folder, progress=lambda done, total: seen.append((done, total)))
    assert loaded.model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("ab") == [256, 97, 98]
    assert seen[-1][0] == seen[-1][1]
    assert load_model(str(folder), dtype=torch.float32).model.lm_head.weight.dtype == torch.float32


def test_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    loaded = load_model(save_checkpoint(build(TINY), tmp_path / "out"))
    assert loaded.tokenizer is None
    assert any("no tokenizer.json" in note for note in loaded.notes)


def test_chat_template_is_mentioned(tmp_path: Path) -> None:
    folder = save_checkpoint(build(TINY), tmp_path / "out", tokenizer=byte_tokenizer())
    (folder / "chat_template.jinja").write_text("{{ 1/0 }}")
    assert any("chat template" in note for note in load_model(folder).notes)


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    folder = save_checkpoint(build(TINY), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Model", "AutoConfig": "modeling_evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    assert any("auto_map" in note for note in load_model(folder).notes)
    assert not any("modeling_evil" in name for name in sys.modules)


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    config = replace(TINY, vocab_size=100, bos_token_id=None, eos_token_id=None)
    folder = save_checkpoint(build(config), tmp_path / "out", tokenizer=byte_tokenizer())
    with pytest.raises(CheckpointError, match=r"ids up to 257.*vocab_size = 100"):
        load_model(folder)


def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="did you mean deepseek-moe-tiny"):
        load_model("deepseek-moe-tin")
    with pytest.raises(CheckpointError, match=r"hf download deepseek-ai/deepseek-moe-16b-base"):
        load_model("deepseek-ai/deepseek-moe-16b-base")
    with pytest.raises(CheckpointError, match="no folder 'zzz'"):
        load_model("zzz")


def test_progress_on_stderr_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with progress_bar("Loading") as progress:
            for done in range(11):
                progress(done * 10**9, 10 * 10**9)
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "Loading" in shown.err
        if not terminal:
            assert shown.err.splitlines()[-1] == "Loading: 10.00 of 10.00 GB"
            assert len(shown.err.splitlines()) == 4
