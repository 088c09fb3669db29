"""Tiny random models of every family of transformers whose experts are on its experts interface.

Nothing is downloaded: a family's own config class is filled with small sizes by the names of its fields
(`family_sizes`), and the first of its model classes that holds experts is built from it: the causal language model, or
the text model of a family that also sees or hears.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_compiler.huggingface.family_sizes import CLASSES, EXPERT_COUNTS, FAMILY, SIZES
from dsmoe_compiler.huggingface.registration import is_experts

MARK = "@use_experts_implementation"
PREFERRED = ("ForCausalLM", "TextModel", "Model", "")  # endings of the names of model classes, best first


def families() -> tuple[str, ...]:
    """The families of the installed transformers that declare an experts implementation, without importing them."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    models = Path(spec.origin).parent / "models"
    found = (path for path in models.glob("*/modeling_*.py") if MARK in path.read_text(encoding="utf-8"))
    return tuple(sorted({path.parent.name for path in found}))


def build(family: str, *, seed: int = 0) -> nn.Module:
    """A model of `family` in float32 and eval mode, with the same random weights on every call, outputs about 1.

    Raises: ValueError with what was tried, if no class of the family could be built.
    """
    tried = []
    for model_class, config_class in _classes(family):
        values = {**SIZES, **FAMILY.get(family, {})}
        known = {f.name for f in fields(config_class)} | set(getattr(config_class, "attribute_map", {}))
        try:
            config = config_class(**{name: value for name, value in values.items() if name in known})
            with torch.random.fork_rng():  # some vectors are initialised at random too
                torch.manual_seed(seed)
                model = model_class(config)
        except Exception as error:  # whatever a config or a constructor objects to belongs on the page
            tried.append(f"{model_class.__name__}: {type(error).__name__}: {_line(error)}")
            continue
        if any(is_experts(module) for module in model.modules()):
            return seeded(model, seed).eval()
        tried.append(f"{model_class.__name__} has no experts at these sizes")
    raise ValueError("; ".join(tried) or "no model class with a number of experts in its config")


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """`model` with matrices divided by the square root of their fan-in, and small biases; norms stay as they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() < 2 and "bias" not in name and "sink" not in name:
                continue
            fan_in = 1 if "embed" in name else tensor.shape[-1] if tensor.dim() > 1 else 16
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
    return model


def prompt(batch: int = 2, length: int = 8) -> Tensor:
    """Token ids `[B, S]` that are no special tokens."""
    return torch.randint(8, 88, (batch, length), generator=torch.Generator().manual_seed(1))


def _classes(family: str) -> Iterator[tuple[type[Any], type[Any]]]:
    """The family's model classes whose config counts experts, with their configs, best first."""
    from transformers import PreTrainedModel

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found = [
        (name, one, one.config_class)
        for name, one in vars(module).items()
        if inspect.isclass(one) and issubclass(one, PreTrainedModel) and one.__module__ == module.__name__
    ]
    if family in CLASSES:
        found = [(name, one, config) for name, one, config in found if name == CLASSES[family]]
    for ending in PREFERRED:
        for name, one, config in found:
            rank = next(e for e in PREFERRED if name.endswith(e))
            if rank == ending and not name.endswith("PreTrainedModel") and config is not None and _counts(config):
                yield one, config


def _counts(config: type[Any]) -> bool:
    known = {f.name for f in fields(config)} | set(getattr(config, "attribute_map", {}))
    return any(name in known for name in EXPERT_COUNTS)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
