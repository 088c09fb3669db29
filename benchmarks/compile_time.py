"""Loading and compiling a deep model on a CPU: 28 layers with the structure of deepseek-moe-16b at 1/8 of its width.

    python -m benchmarks.compile_time --threads 2

A checkpoint with random weights is written first (not counted), in the official layout. Counted: reading it, capture,
both phases' code and, apart, the proof. Inductor's cache starts empty, so that g++ precompiles its headers too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsmoe_compiler import api
from dsmoe_compiler.compare.conditions import conditions
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.loading import load_model
from dsmoe_model.checkpoint import save_checkpoint
from dsmoe_model.config import ModelConfig
from dsmoe_model.presets import preset
from dsmoe_model.transformer import build

LAYERS, FRACTION = 28, 8


def narrow(layers: int) -> ModelConfig:
    """deepseek-moe-16b with every width divided by 8: hidden, heads' width, experts, vocabulary."""
    wide = preset("deepseek-moe-16b")
    return replace(
        wide,
        num_hidden_layers=layers,
        hidden_size=wide.hidden_size // FRACTION,
        head_dim=wide.head_dim // FRACTION,
        intermediate_size=wide.intermediate_size // FRACTION,
        moe_intermediate_size=wide.moe_intermediate_size // FRACTION,
        vocab_size=wide.vocab_size // FRACTION,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=(wide.hidden_size // FRACTION) ** -0.5,
    )


def measure(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Seconds of each step, and how many kernels were generated for how many launches."""
    save_checkpoint(build(config, seed=0), folder / "checkpoint")
    marks = [("start", time.perf_counter())]

    def tell(line: str) -> None:
        print(f"{time.perf_counter() - marks[0][1]:7.1f} s  {line}", file=sys.stderr)
        marks.append((line, time.perf_counter()))

    loaded = load_model(folder / "checkpoint")
    tell("loaded")
    artifact = api.compile(loaded, config=CompileConfig(target="cpu", strict=True, max_seq_len=512), progress=tell)
    end = time.perf_counter()
    artifact.discard()
    proof = artifact.manifest["verification"]["seconds"]
    phases = artifact.manifest["phases"].values()
    return {
        "layers": config.num_hidden_layers,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "seconds": {
            "load": marks[1][1] - marks[0][1],
            "capture": artifact.manifest["capture_seconds"],
            "load_and_compile": end - marks[0][1] - proof,
            "verify": proof,
        },
        "kernels": {phase["file"]: phase["kernels"] for phase in phases},
        "launches": {phase["file"]: phase["launches"] for phase in phases},
        "operators": {phase["file"]: phase["operators"] for phase in phases},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/compile_time_cpu.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="dsmoe-benchmark-") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "inductor"))
        result = {"benchmark": "compile_time", "environment": conditions(torch.device("cpu"))}
        result |= measure(narrow(arguments.layers), Path(folder))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
