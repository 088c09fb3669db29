"""The weights of an artifact: safetensors files that all formats and phases share, each tensor once.

Written one tensor at a time, read one chunk at a time: neither holds a second copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from dsmoe_model.checkpoint.shards import DTYPES, NAMES, read_header, read_tensor, write_shard
from dsmoe_runtime.errors import TargetError

WEIGHTS = "weights"
SHARD_BYTES = 4 * 10**9


def write_weights(
    graphs: dict[str, fx.GraphModule], folder: Path, *, progress: Callable[[str], None]
) -> dict[str, dict[str, str]]:
    """Write every tensor that the graphs read, each once: phase -> its name in the graph -> its name in `folder`."""
    stored, names = stored_weights(graphs)
    write_shards(stored, folder, progress=progress)
    return names


def stored_weights(graphs: dict[str, fx.GraphModule]) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    """Every tensor that the graphs read by the name it is stored under, and phase -> its name in the graph -> that."""
    stored: dict[str, Tensor] = {}
    names: dict[str, dict[str, str]] = {}
    for phase, graph in graphs.items():
        names[phase] = {}
        for target in sorted({str(node.target) for node in graph.graph.find_nodes(op="get_attr")}):
            tensor: Any = reduce(getattr, target.split("."), graph)
            if not isinstance(tensor, Tensor):  # a submodule
                continue
            if not tensor.is_contiguous() or tensor.dtype not in NAMES:
                what = f"{tensor.dtype}, shape {tuple(tensor.shape)}, strides {tensor.stride()}"
                raise TargetError(
                    f"{phase}: the weight {target!r} ({what}) cannot be stored; make it contiguous and plain"
                )
            name = next((n for n in (target, f"{phase}.{target}") if n not in stored or same(stored[n], tensor)), None)
            if name is None:
                raise TargetError(f"{phase}: the name {phase}.{target!r} is taken by another weight")
            stored[name] = tensor
            names[phase][target] = name
    return stored, names


def write_shards(stored: dict[str, Tensor], folder: Path, *, progress: Callable[[str], None]) -> None:
    """Write the tensors into as many files as their size takes."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    for name, weight in stored.items():
        if shards[-1] and sum(t.nbytes for _, t in shards[-1]) + weight.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, weight))
    folder.mkdir()
    for number, shard in enumerate(shards, 1):
        write_shard(folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors", shard)
        progress(f"weights: {number} of {len(shards)} files, {len(stored)} tensors")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are one: the same memory, or equal copies (each phase packs for itself)."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def read_weights(files: list[Path], device: torch.device) -> dict[str, Tensor]:
    """The tensors of weight files, in memory of our own: a file that changes later changes nothing here."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        for entry in read_header(file).values():
            tensors[entry.name] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device=device)
            for _ in read_tensor(entry, tensors[entry.name]):
                pass
    return tensors
