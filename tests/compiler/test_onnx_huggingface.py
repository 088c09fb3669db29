"""Models of transformers to ONNX: every family that is fused, proved, and generating what transformers generates."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import dsmoe_compiler as dsmoe
from dsmoe_runtime.errors import TargetError

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("onnx")
import onnx

from tests.compiler.onnx_examples import exported
from tests.passes.hf_models import FAMILIES, tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
GENERATING = [family for family in FAMILIES if family != "deepseek_ocr2"]  # that one wants pictures
CHEAP = {("deepseek_v3", torch.float32)}
PLAIN = {"gpt_oss"}  # its attention has sinks, which Attention has not


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(f, dtype, marks=() if (f, dtype) in CHEAP else pytest.mark.slow, id=f"{f}-{dtype}")
        for f in GENERATING
        for dtype in (torch.float32, torch.float16)
    ],
)
def test_exported_proved_and_generating(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = tiny(family, dtype=dtype)
    folder = exported(model).save(tmp_path / "out")
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    operators = Counter(node.op_type for node in proto.graph.node)
    assert operators["DsMoE"] == 2
    assert operators["RotaryEmbedding"] == 4
    assert operators["Attention"] == (0 if family in PLAIN else 2)
    assert operators["RMSNormalization"] >= 5
    ids = torch.randint(3, 90, (3, 5), generator=torch.Generator().manual_seed(2))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(dsmoe.load(folder).generate(ids, max_new_tokens=12), expected)


@pytest.mark.slow
def test_a_folder_that_transformers_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dsmoe_compiler.cli.main import main

    tiny("qwen3_moe").save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert main(["compile", str(tmp_path / "model"), "-o", str(out), "--format", "onnx", "--dtype", "fp16"]) == 0
    assert "2 of 2 MoE layers fused" in capsys.readouterr().out
    assert dsmoe.load(out).dtype == torch.float16


@pytest.mark.slow
def test_a_window_of_attention_is_kept(tmp_path: Path) -> None:
    """Longer than the window, by prompts and by single tokens: what lies outside is not seen."""
    model: Any = tiny("mixtral", sliding_window=6)
    runner = dsmoe.load(exported(model).save(tmp_path / "out"))
    ids = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(2))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(runner.generate(ids, max_new_tokens=12), expected)


@pytest.mark.slow
def test_what_onnx_cannot_say_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsmoe_compiler.targets.onnx import spelling

    monkeypatch.setattr(spelling, "rotate_complex", lambda graph: None)
    with pytest.raises(TargetError, match=r"a DeepseekV2ForCausalLM in memory cannot be written as ONNX: .*complex"):
        exported(tiny("deepseek_v2"))
