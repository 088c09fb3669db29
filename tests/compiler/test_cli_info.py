"""`dsmoe list` and `dsmoe info`: figures of the paper, and what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsmoe_compiler.cli import main
from dsmoe_compiler.description import describe
from dsmoe_model.checkpoint import save_checkpoint
from dsmoe_model.presets import PRESETS, preset
from dsmoe_model.transformer import build

TINY = "deepseek-moe-tiny"


def test_list_has_every_preset_with_the_paper_s_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:] if line.strip()}
    assert set(PRESETS) <= set(rows)
    assert rows["deepseek-moe-16b"][-4:] == ["16.4B", "2.8B", "74.4T", "4096"]
    assert rows["deepseek-moe-2b"][-4:] == ["2.0B", "0.3B", "4.3T", "2048"]
    assert rows["llama2-7b"][-4:] == ["6.7B", "6.7B", "187.9T", "4096"]


def test_info_counts_16b_to_the_last_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "deepseek-moe-16b"]) == 0
    out = capsys.readouterr().out
    assert "16,375,728,128" in out
    assert "1.8 GiB in fp32" in out  # 2 * 28 layers * 16 heads * 128 * 4096 tokens * 4 bytes
    assert "74.4T for 4096 tokens" in out


def test_info_says_where_the_paper_disagrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "deepseek-moe-142b-half"]) == 0
    assert "the paper prints 12.2B" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["deepseek-moe-16b", "hash-2b", "dense-x4", "gshard-2b", "llama2-7b"])
def test_layers_and_the_rest_make_up_the_model(name: str) -> None:
    found = describe(name)
    in_layers = sum((group.last - group.first + 1) * group.total for group in found.layers)
    activated = sum((group.last - group.first + 1) * group.activated for group in found.layers)
    outside = found.parts["embedding"] + found.config.hidden_size  # the last norm
    assert in_layers + outside == found.total
    assert activated + outside == found.activated


def test_info_of_a_checkpoint_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a model of ours ✓"
    model = build(preset(TINY), dtype=torch.bfloat16, seed=1)
    save_checkpoint(model, folder)
    assert main(["info", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["files"]["dtype"] == "bfloat16"
    assert found["files"]["weight_bytes"] == 2 * found["total"]
    assert not found["files"]["tokenizer"]
    assert main(["info", str(folder)]) == 0
    assert "a model of ours ✓" in capsys.readouterr().out
