"""Save a model as a checkpoint folder in the official layout: a tensor per expert, shards with an index, `config.json`.

The folder is written beside its place and renamed, so it is there whole or not at all.
"""

import os
import shutil
from pathlib import Path

from torch import Tensor

from dsmoe_model.checkpoint.config_json import config_json
from dsmoe_model.checkpoint.index import INDEX, SINGLE
from dsmoe_model.checkpoint.json_files import write_json
from dsmoe_model.checkpoint.layouts import model_slots
from dsmoe_model.checkpoint.shards import write_shard
from dsmoe_model.checkpoint.tokenizer import Tokenizer
from dsmoe_model.errors import CheckpointError
from dsmoe_model.transformer import Transformer


def save_checkpoint(
    model: Transformer, folder: str | Path, *, tokenizer: Tokenizer | None = None, max_shard_bytes: int = 5 * 10**9
) -> Path:
    """Write `model` to a new folder and return its path; `load_checkpoint` gives the same bits back.

    Raises CheckpointError if the folder exists and is not empty: nothing is overwritten.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{str(folder)!r} exists and is not an empty folder: give a new name.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    part.mkdir()
    try:
        _write(model, part, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(part)
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def _write(model: Transformer, folder: Path, max_shard_bytes: int) -> None:
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shards: list[list[tuple[str, Tensor]]] = [[]]
    room = max_shard_bytes
    for slot in model_slots(model.config):
        tensor = slot.view(places)
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((slot.name, tensor))
        room -= nbytes
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for name, tensors in zip(names, shards, strict=True):
        write_shard(folder / name, tensors)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _ in shard}
        total = sum(tensor.numel() * tensor.element_size() for shard in shards for _, tensor in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    write_json(folder / "config.json", config_json(model.config, dtype))
