"""Driver: from a model to a verified artifact.

    import dsmoe_compiler as dsmoe

`compile`, `export_onnx`, `explain` and `load` come from `dsmoe_compiler.api`; they are fetched when first asked for, so
that importing the package costs no import of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsmoe_compiler.version import __version__

if TYPE_CHECKING:
    from dsmoe_compiler.api import compile, explain, export_onnx, load
    from dsmoe_compiler.artifact import Artifact
    from dsmoe_compiler.config import CompileConfig
    from dsmoe_compiler.explanation import Explanation
    from dsmoe_compiler.huggingface import register_experts, use_experts
    from dsmoe_compiler.runner import Runner

__all__ = [
    "Artifact",
    "CompileConfig",
    "Explanation",
    "Runner",
    "__version__",
    "compile",
    "explain",
    "export_onnx",
    "load",
    "register_experts",
    "use_experts",
]
HOMES = {
    "Artifact": "artifact",
    "CompileConfig": "config",
    "Explanation": "explanation",
    "Runner": "runner",
    "compile": "api",
    "explain": "api",
    "export_onnx": "api",
    "load": "api",
    "register_experts": "huggingface",
    "use_experts": "huggingface",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in HOMES:
        raise AttributeError(f"module 'dsmoe_compiler' has no attribute {name!r}")
    return getattr(import_module(f"dsmoe_compiler.{HOMES[name]}"), name)
