"""Checkpoint folders that transformers reads: checked first, then loaded by its own classes; nothing is downloaded.

The index and every header are checked as for our own layout before transformers opens anything: it would follow names
that lead out of the folder. Python code in a folder is never run, and pickle is never opened.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsmoe_compiler.huggingface.versions import check
from dsmoe_model.checkpoint import Tokenizer, load_tokenizer
from dsmoe_model.checkpoint.config_json import CONFIG_LIMIT, WHOLE
from dsmoe_model.checkpoint.index import checkpoint_folder, read_tensor_entries
from dsmoe_model.checkpoint.json_files import file_inside, read_json
from dsmoe_runtime.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """A causal language model of transformers in eval mode with what belongs to it; see `loading.Loaded`."""

    model: Any
    tokenizer: Tokenizer | None
    source: str
    notes: tuple[str, ...]

    @property
    def text(self) -> Any:
        """The configuration of the language model: of a multimodal one, its text part."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def vocab_size(self) -> int:
        """Token ids are in [0, vocab_size)."""
        return int(self.text.vocab_size)

    @property
    def positions(self) -> int:
        """The longest sequence that the model was made for."""
        return int(getattr(self.text, "max_position_embeddings", None) or 2**31)

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding."""
        return self.model.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Of the embedding."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]


def is_pretrained(model: object) -> bool:
    """Whether this is a model of transformers, without importing it."""
    return any(c.__module__.startswith("transformers.") and c.__name__ == "PreTrainedModel" for c in type(model).mro())


def is_for_transformers(name: str | Path) -> bool:
    """Whether a folder is of a family that the reference model is not: then transformers reads it."""
    folder = Path(name)
    if not (folder / "config.json").is_file():
        return False
    raw = read_json(file_inside(folder, "config.json", said_by=f"{str(folder)!r}"), limit=CONFIG_LIMIT)
    return isinstance(raw.get("model_type"), str) and raw["model_type"] not in WHOLE


def refuse_transformers(name: str | Path) -> None:
    """For the commands that know the reference model alone. Raises: CheckpointError that names the others."""
    if is_for_transformers(name):
        raise CheckpointError(
            f"{str(name)!r} is of a family that the reference model is not; transformers has its code. `dsmoe explain "
            f"{name}` and `dsmoe compile {name} -o OUT` read it, and what OUT holds generates: `dsmoe generate OUT`"
        )


def load_folder(
    name: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Pretrained:
    """The model of a folder with its weights. Raises: CheckpointError, ConfigError, as `loading.load_model`."""
    folder = checkpoint_folder(name)
    entries = read_tensor_entries(folder)
    config = read_config(folder)
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False,
            use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {str(folder)!r}: {first_line(error)}") from None
    model, said = loaded
    for what in ("missing_keys", "mismatched_keys"):
        if said.get(what):
            names = sorted(str(key) for key in said[what])
            raise CheckpointError(
                f"{str(folder)!r}: {len(names)} {what.replace('_', ' ')}: {', '.join(names[:3])}. transformers would "
                "fill them with random numbers: refused. Take the whole checkpoint"
            )
    notes = [f"{len(entries)} tensors, read by transformers as {type(model).__name__}."]
    if said.get("unexpected_keys"):
        names = sorted(said["unexpected_keys"])
        notes.append(f"{len(names)} tensors that the model does not have were not read: {names[0]}, ...")
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        notes.append("the folder has no tokenizer.json: token ids in, token ids out.")
    return Pretrained(model.to(device).eval(), tokenizer, f"checkpoint {folder}", tuple(notes))


def structure_of(name: str | Path) -> Pretrained:
    """The model of a folder without its weights, on the meta device."""
    folder = checkpoint_folder(name)
    config = read_config(folder)
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    except (ValueError, KeyError) as error:
        raise ConfigError(f"transformers cannot build {str(folder)!r}: {first_line(error)}") from None
    return Pretrained(model, None, f"checkpoint {folder}", ())


def read_config(folder: Path) -> Any:
    """The configuration as transformers has it. Raises: ConfigError for a family that it does not have itself."""
    raw = read_json(file_inside(folder, "config.json", said_by=f"{str(folder)!r}"), limit=CONFIG_LIMIT)
    check(f"{str(folder)!r} has model_type {str(raw.get('model_type'))[:60]!r}, which transformers reads")
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        kind, version = str(raw.get("model_type"))[:60], transformers.__version__
        if kind in transformers.CONFIG_MAPPING:
            why = f"transformers {version} cannot read its config.json"
        else:
            code = ", and Python code in a checkpoint is never run" if raw.get("auto_map") else ""
            why = f"transformers {version} has no model_type {kind!r}{code}"
        raise ConfigError(f"{str(folder)!r}: {why}: {first_line(error)}") from None


@contextmanager
def experts_run_as(model: Any, implementation: str) -> Iterator[None]:
    """While open, the experts run by this implementation of transformers; afterwards as before."""
    config = model.config
    configs = [c for c in (config, *vars(config).values()) if hasattr(c, "_experts_implementation")]
    before = [c._experts_implementation for c in configs]
    model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        for one, name in zip(configs, before, strict=True):
            one._experts_implementation = name


def stacked_experts(model: Any) -> list[tuple[str, Any]]:
    """The modules that hold stacked experts `[E, ., .]`, two tensors at least, by their paths in the model's order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if sum(p.dim() == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False)) >= 2
    ]


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
