"""Profiles for a GPU, proved on it: our kernels by the library beside the model, and ONNX Runtime's own operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dsmoe_compiler as dsmoe
from dsmoe_runtime.errors import ArtifactError

pytest.importorskip("onnxscript")
pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from tests.compiler.onnx_examples import exported, gate_model  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="needs onnxruntime-gpu"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("profile", ["ort-cuda", "ort-contrib"])
def test_proved_on_the_gpu_and_generating(profile: str, dtype: torch.dtype, tmp_path: Path) -> None:
    artifact = exported(gate_model("v3", dtype), profile=profile, target="cuda")
    runner: Any = dsmoe.load(artifact.save(tmp_path / "out"))
    node = {"ort-cuda": "DsMoELayer", "ort-contrib": "MoE"}[profile]
    assert runner.manifest["onnx"]["nodes"] == {"layers.1.mlp": f"layers.1.mlp/{node}"}
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(1)).cuda()
    together = runner.generate(ids, max_new_tokens=12)
    assert together.shape == (2, 21)
    with torch.cuda.stream(torch.cuda.Stream()):
        again = runner.generate(ids, max_new_tokens=12)
    assert torch.equal(again, together)


def test_without_the_body_only_the_library_runs_it(tmp_path: Path) -> None:
    artifact = exported(gate_model("v1", torch.float16), profile="ort-cuda", functions=False)
    assert artifact.manifest["onnx"]["functions"] == []
    (artifact.folder / "libdsmoe_ort.so").unlink()
    with pytest.raises(ArtifactError, match="DsMoELayer"):
        artifact.runner()
