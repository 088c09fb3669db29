"""In a fresh process without the optional packages, everything imports and the small preset runs."""

from __future__ import annotations

import subprocess
import sys
import textwrap

BLOCK = """
import sys

class Without:
    # What another finder finds, but for the optional packages: those look as if they had never been installed.
    names = {"triton", "onnx", "onnxruntime", "onnxscript", "torch_mlir", "transformers", "matplotlib"}

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in self.names else self.finder.find_spec(fullname, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run(code: str, *, block: bool) -> str:
    program = (BLOCK if block else "") + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_and_runs_without_anything_optional() -> None:
    out = run(
        """
        import torch
        import dsmoe_compiler
        import dsmoe_passes
        import dsmoe_runtime.ops
        from dsmoe_model.presets import preset
        from dsmoe_model.transformer import build

        config = preset("deepseek-moe-tiny")
        model = build(config, dtype=torch.float32, device="cpu", seed=0)
        logits = model(torch.tensor([[256, 72, 105]])).logits_BSV
        assert torch.isfinite(logits).all()
        print(tuple(logits.shape) == (1, 3, config.vocab_size), round(logits.std().item(), 6) > 0)
        """,
        block=True,
    )
    assert out.split() == ["True", "True"]


def test_the_block_above_blocks() -> None:
    out = run(
        """
        try:
            import transformers
        except ModuleNotFoundError as error:
            print("blocked", error.name)
        """,
        block=True,
    )
    assert out.split() == ["blocked", "transformers"]


def test_help_and_version_do_not_wait_for_torch() -> None:
    """torch takes seconds to import; `dsmoe --help` must not."""
    out = run(
        """
        import sys
        from dsmoe_compiler.cli.main import main

        for arguments in (["--version"], ["--help"], ["compile", "--help"]):
            try:
                main(arguments)
            except SystemExit as leave:
                assert leave.code == 0
        print("torch" in sys.modules)
        """,
        block=False,
    )
    assert out.split()[-1] == "False"
