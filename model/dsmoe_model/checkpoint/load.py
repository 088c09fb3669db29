"""Load a checkpoint folder: everything is checked first, then each tensor is read straight to its place.

Experts go into the stacked parameter as they arrive, so beside the weights there is never more than one chunk.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dsmoe_model.checkpoint.config_json import read_config
from dsmoe_model.checkpoint.index import checkpoint_folder, read_tensor_entries
from dsmoe_model.checkpoint.layouts import Slot, match, model_slots, moe_slots
from dsmoe_model.checkpoint.shards import DTYPES, TensorEntry, read_tensor
from dsmoe_model.config import ModelConfig
from dsmoe_model.errors import CheckpointError
from dsmoe_model.moe import MoE
from dsmoe_model.transformer import Transformer

Progress = Callable[[int, int], None]  # bytes read so far, bytes in all


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was looked through and found sound; no weight has been read yet."""

    folder: Path
    config: ModelConfig
    model_type: str
    tensors: tuple[tuple[Slot, TensorEntry], ...]  # in file order
    notes: tuple[str, ...]  # remarks for the reader: what was ignored, and why

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the embedding is stored in; the one to load with unless another is asked for."""
        return next(DTYPES[entry.dtype] for slot, entry in self.tensors if slot.parameter == "embed_tokens.weight")

    @property
    def nbytes(self) -> int:
        """Bytes of weights on disk."""
        return sum(entry.nbytes for _, entry in self.tensors)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Check config, index, every header, and every name, shape and dtype of a folder. Reads no weight.

    Raises CheckpointError or ConfigError; each names the file, tensor or key at fault.
    """
    folder = checkpoint_folder(folder)
    said = read_config(folder)
    entries = read_tensor_entries(folder)
    tied = said.config.tie_word_embeddings
    tensors = match(model_slots(said.config, entries), entries, of=f"{str(folder)!r}", tied_head=tied)
    used = {entry.name for _, entry in tensors}
    notes = list(said.notes)
    constants = [name for name in entries if name not in used]
    if constants:
        notes.append(f"{len(constants)} tensors not read, the model derives them itself: {constants[0]}, ...")
    return Checkpoint(folder, said.config, said.model_type, tuple(tensors), tuple(notes))


def load_checkpoint(
    checkpoint: Checkpoint | str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Transformer:
    """The model of a checkpoint folder, in eval mode, in `dtype` (default: as stored) on `device`.

    Warns, naming them, if tensors hold NaN or infinity. Peak host memory is the weights (none of them for a model on
    another device) and one chunk of 16 MiB.
    """
    found = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    with torch.device("meta"):
        model = Transformer(found.config).to(dtype or found.dtype)
    model = model.to_empty(device=device)
    if found.config.tie_word_embeddings:  # to_empty allocates once for each name
        model.lm_head.weight = model.embed_tokens.weight
    _fill(model, found.tensors, progress)
    return model.eval()


def load_moe_block(
    folder: str | Path,
    layer: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> MoE:
    """One mixture-of-experts block, also of DeepSeek-V2 and -V3, whose attention the reference model has not.

    Raises CheckpointError or ConfigError as `open_checkpoint` does, looking at this block's tensors only.
    """
    folder = checkpoint_folder(folder)
    config = read_config(folder, block_only=True).config
    if not 0 <= layer < config.num_hidden_layers or not config.is_moe_layer(layer):
        raise CheckpointError(
            f"layer {layer} of {str(folder)!r} has no experts: of its {config.num_hidden_layers} layers the first "
            f"{config.first_k_dense_replace} are dense, then those divisible by {config.moe_layer_freq} have experts."
        )
    entries = read_tensor_entries(folder)
    at = next((prefix for prefix in ("model.", "") if f"{prefix}layers.{layer}.mlp.gate.weight" in entries), "model.")
    at = f"{at}layers.{layer}.mlp."
    own = {name: entry for name, entry in entries.items() if name.startswith(at)}
    tensors = match(moe_slots(config, at, "", own), own, of=f"layer {layer} of {str(folder)!r}")
    with torch.device("meta"):
        block = MoE(config).to(dtype or DTYPES[tensors[0][1].dtype])
    block = block.to_empty(device=device)
    _fill(block, tensors, progress)
    return block.eval()


@torch.no_grad()
def _fill(module: nn.Module, tensors: Iterable[tuple[Slot, TensorEntry]], progress: Progress | None) -> None:
    """Read every tensor to its place in the module's parameters and buffers."""
    tensors = list(tensors)
    places = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    total, done = sum(entry.nbytes for _, entry in tensors), 0
    for slot, entry in tensors:
        for nbytes in read_tensor(entry, slot.view(places)):
            done += nbytes
            if progress is not None:
                progress(done, total)
    suspects = {name for name, tensor in places.items() if not _finite(tensor)}
    names = [entry.name for slot, entry in tensors if slot.parameter in suspects and not _finite(slot.view(places))]
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        warnings.warn(f"{len(names)} tensors hold NaN or infinity as loaded: {shown}", stacklevel=3)


def _finite(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()  # NaN wins both; needs no second tensor, as isfinite() does
    return bool(low.isfinite() & high.isfinite())
