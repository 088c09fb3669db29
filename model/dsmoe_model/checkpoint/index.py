"""Which tensors a checkpoint folder holds, and where: every name and every header is judged before a weight is read.

A folder holds `model.safetensors`, or shards and `model.safetensors.index.json`: {"weight_map": {tensor: shard}}.
"""

import re
from pathlib import Path

from dsmoe_model.checkpoint.json_files import file_inside, read_json
from dsmoe_model.checkpoint.shards import TensorEntry, read_header
from dsmoe_model.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
INDEX_LIMIT = 64 * 2**20  # bytes; DeepSeek-V3's index of 91,991 names has 9 MB
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def checkpoint_folder(name: str | Path) -> Path:
    """The local folder; nothing is ever downloaded. Raises CheckpointError that says how to get it."""
    folder = Path(name)
    if "\0" in str(name):
        raise CheckpointError(f"{str(name)!r} is not a path.")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{str(folder)!r} is a file; a checkpoint is a folder of config.json and *.safetensors.")
    if HUB_ID.fullmatch(str(name)):
        raise CheckpointError(
            f"there is no folder {str(name)!r} here, and nothing is downloaded. If it is a model on the Hugging Face "
            f"Hub, fetch it first, `hf download {name} --local-dir {folder.name}`, and give the folder {folder.name!r}."
        )
    raise CheckpointError(f"there is no folder {str(folder)!r}.")


def read_tensor_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the folder by name. Raises CheckpointError naming the file or tensor at fault."""
    if (folder / INDEX).exists():
        return _sharded(folder)
    if (folder / SINGLE).exists():
        return read_header(file_inside(folder, SINGLE, said_by=f"{str(folder)!r}"))
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if others:
        raise CheckpointError(
            f"{str(folder)!r} holds its weights only as pickle ({', '.join(others[:3])}), which can run code when "
            "opened: refused. Take a safetensors revision of the model, or convert it where you trust it, for instance "
            "with transformers' save_pretrained."
        )
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f" (it has {', '.join(loose[:3])} but no index; download {INDEX} too)" if loose else ""
    raise CheckpointError(f"{str(folder)!r} has neither {SINGLE} nor {INDEX}{found}.")


def _sharded(folder: Path) -> dict[str, TensorEntry]:
    """Index against shards: the same names on both sides, each in the shard the index says."""
    index_path = file_inside(folder, INDEX, said_by=f"{str(folder)!r}")
    where = read_json(index_path, limit=INDEX_LIMIT).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{str(index_path)!r} has no weight_map.")
    shards: dict[str, Path] = {}
    for tensor, shard in where.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{str(index_path)!r}: the shard of {tensor[:200]!r} must be a name.")
        if shard not in shards:
            shards[shard] = file_inside(folder, shard, said_by=f"{str(index_path)!r} for tensor {tensor[:200]!r}")
    if SINGLE not in shards and (folder / SINGLE).exists():
        raise CheckpointError(f"{str(folder)!r} has both {INDEX} and an unlisted {SINGLE}: remove the stale one.")
    pickled = sorted(name for name in shards if not name.endswith(".safetensors"))
    if pickled:
        raise CheckpointError(f"{str(index_path)!r} lists {pickled[0]!r}: only .safetensors shards are opened.")
    missing = sorted(name for name, path in shards.items() if not path.exists())
    if missing:
        raise CheckpointError(
            f"{str(folder)!r} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:5])}. Download them."
        )

    entries: dict[str, TensorEntry] = {}
    for shard, path in shards.items():
        for tensor, entry in read_header(path).items():
            if tensor in entries:
                first = entries[tensor].path.name
                raise CheckpointError(
                    f"tensor {tensor[:200]!r} of {str(folder)!r} is in two shards, {first!r} and {shard!r}."
                )
            if where.get(tensor) != shard:
                raise CheckpointError(
                    f"{shard!r} holds tensor {tensor[:200]!r}, but the index says {where.get(tensor)!r}: index and "
                    "shards are not of one checkpoint."
                )
            entries[tensor] = entry
    lost = [tensor for tensor in where if tensor not in entries]
    if lost:
        raise CheckpointError(
            f"{where[lost[0]]!r} lacks tensor {lost[0][:200]!r}, which the index puts there ({len(lost)} such): index "
            "and shards are not of one checkpoint."
        )
    return entries
