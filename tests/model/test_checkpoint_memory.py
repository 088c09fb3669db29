"""Loading needs hardly more host memory than the weights themselves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsmoe_model.checkpoint import open_checkpoint, save_checkpoint
from dsmoe_model.config import ModelConfig
from dsmoe_model.transformer import build

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=512,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    intermediate_size=2048,
    max_position_embeddings=128,
    n_routed_experts=32,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=448,
    first_k_dense_replace=1,
)

# Peak minus what the process held before; a small model is loaded first, so that code and thread pools are not counted.
CHILD = """
import pathlib, sys
from dsmoe_model.checkpoint import load_checkpoint
def kilobytes(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
small = load_checkpoint(sys.argv[1])
del small
before = kilobytes("VmRSS")
model = load_checkpoint(sys.argv[2])
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("max_shard_bytes", [10**12, 40 * 10**6])
def test_peak_host_memory(max_shard_bytes: int, tmp_path: Path) -> None:
    small = ModelConfig(**{**CONFIG.to_dict(), "vocab_size": 64, "num_hidden_layers": 2, "n_routed_experts": 8})
    save_checkpoint(build(small, dtype=torch.bfloat16), tmp_path / "small")
    large = build(CONFIG, dtype=torch.bfloat16, device="meta").to_empty(device="cpu")  # random ones take long
    for parameter in large.parameters():
        parameter.data.fill_(0.5)
    save_checkpoint(large, tmp_path / "large", max_shard_bytes=max_shard_bytes)
    del large
    weights = open_checkpoint(tmp_path / "large").nbytes
    assert weights > 180e6
    command = [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.9 * weights < peak < 1.15 * weights, f"peak {peak / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights"
