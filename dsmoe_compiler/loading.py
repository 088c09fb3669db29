"""From what the user typed to a model that runs: a preset's name or a checkpoint folder, with its tokenizer."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from tqdm import tqdm

from dsmoe_compiler.huggingface.folder import refuse_transformers
from dsmoe_model.checkpoint import (
    Progress,
    Tokenizer,
    byte_tokenizer,
    load_checkpoint,
    load_tokenizer,
    open_checkpoint,
)
from dsmoe_model.config import ModelConfig
from dsmoe_model.errors import CheckpointError
from dsmoe_model.presets import PRESETS
from dsmoe_model.transformer import Transformer, build


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with what belongs to it; `source` says where it came from, `notes` what to know about it."""

    model: Transformer
    config: ModelConfig
    tokenizer: Tokenizer | None
    source: str
    notes: tuple[str, ...]


def load_model(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> Loaded:
    """A preset with random weights from `seed`, or a checkpoint folder with its own.

    `dtype` defaults to float32 for a preset and to what is stored for a checkpoint. A folder wins over a preset of the
    same name if it is written as a path (`./deepseek-moe-tiny`). `progress(bytes done, bytes in all)` is called while a
    checkpoint is read. Raises CheckpointError or ConfigError; nothing is ever downloaded.
    """
    name = str(name_or_folder)
    if isinstance(name_or_folder, str) and name in PRESETS:
        config = PRESETS[name]
        model = build(config, dtype=dtype or torch.float32, device=device, seed=seed)
        return Loaded(
            model, config, _tokenizer_of_preset(config), f"preset {name}, seed {seed}", ("the weights are random.",)
        )
    if "/" not in name and not Path(name).exists() and (near := get_close_matches(name, PRESETS, n=3)):
        raise CheckpointError(f"there is no preset and no folder {name!r}; did you mean {' or '.join(near)}?")

    refuse_transformers(name_or_folder)
    checkpoint = open_checkpoint(name_or_folder)
    tokenizer = load_tokenizer(checkpoint.folder)
    notes = list(checkpoint.notes)
    if tokenizer is None:
        notes.append("the folder has no tokenizer.json: token ids in, token ids out.")
    elif tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {name!r} has ids up to {tokenizer.vocab_size - 1}, but vocab_size = "
            f"{checkpoint.config.vocab_size}: they do not belong together."
        )
    elif tokenizer.has_chat_template:
        notes.append("the tokenizer carries a chat template; it is a program, never executed: prompts are plain text.")
    model = load_checkpoint(checkpoint, dtype=dtype, device=device, progress=progress)
    return Loaded(model, checkpoint.config, tokenizer, f"checkpoint {checkpoint.folder}", tuple(notes))


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A `progress` for `load_model` that draws on stderr: a bar on a terminal, one line a quarter elsewhere."""
    if not sys.stderr.isatty():
        quarters = {0}

        def line(done: int, total: int) -> None:
            quarter = 4 * done // max(total, 1)
            if quarter not in quarters:
                quarters.add(quarter)
                print(f"{title}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr)

        yield line
        return
    with tqdm(desc=title, unit="B", unit_scale=True, file=sys.stderr, leave=False) as bar:

        def draw(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield draw


def _tokenizer_of_preset(config: ModelConfig) -> Tokenizer | None:
    """Presets that speak bytes have the byte tokenizer's special ids; the paper's vocabularies are not public."""
    tokenizer = byte_tokenizer()
    speaks_bytes = (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    return tokenizer if speaks_bytes and config.vocab_size >= tokenizer.vocab_size else None
