"""Checkpoints: safetensors folders in the layouts of the published models."""

from dsmoe_model.checkpoint.load import Checkpoint, Progress, load_checkpoint, load_moe_block, open_checkpoint
from dsmoe_model.checkpoint.save import save_checkpoint
from dsmoe_model.checkpoint.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

__all__ = [
    "Checkpoint",
    "Progress",
    "Tokenizer",
    "byte_tokenizer",
    "load_checkpoint",
    "load_moe_block",
    "load_tokenizer",
    "open_checkpoint",
    "save_checkpoint",
]
