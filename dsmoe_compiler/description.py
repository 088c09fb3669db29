"""What a model is before it runs: parameters, FLOPs, layers and key-value cache, counted on the meta device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn

from dsmoe_compiler.huggingface.folder import refuse_transformers
from dsmoe_model.accounting import PRINTED, account, disagreements, paper_flops, training_flops
from dsmoe_model.checkpoint import load_tokenizer, open_checkpoint
from dsmoe_model.config import ModelConfig
from dsmoe_model.mlp import MLP
from dsmoe_model.presets import PRESETS, preset
from dsmoe_model.transformer import Block, build


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Consecutive layers of one kind; parameters are those of one layer."""

    first: int
    last: int
    feed_forward: str
    attention: int
    total: int
    activated: int


@dataclass(frozen=True, kw_only=True)
class Files:
    """What a checkpoint folder holds; nothing of the weights has been read."""

    folder: str
    model_type: str
    tensors: int
    shards: tuple[str, ...]
    weight_bytes: int
    dtype: str
    tokenizer: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Description:
    """`flops` are of one training step over `flops_tokens` tokens, forward and backward; `paper_flops` the same as the
    DeepSeekMoE paper counts; `cache_elements` the keys and values of one token in all layers."""

    name: str
    config: ModelConfig
    total: int
    activated: int
    parts: dict[str, int]
    flops_tokens: int
    flops: float
    paper_flops: float
    disagreements: tuple[str, ...]
    layers: tuple[LayerGroup, ...]
    cache_elements: int
    files: Files | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(name_or_folder: str) -> Description:
    """Describe a preset, or a checkpoint folder after checking its config and every header.

    Raises:
        CheckpointError, ConfigError: the folder is refused, or the preset is unknown; names what and where.
    """
    if name_or_folder in PRESETS:
        config, files = preset(name_or_folder), None
    else:
        config, files = _files(name_or_folder)
    counted = account(config)
    printed = PRINTED.get(name_or_folder) if files is None else None
    tokens = printed.tokens if printed else config.max_position_embeddings
    return Description(
        name=name_or_folder,
        config=config,
        total=counted.total,
        activated=counted.activated,
        parts={name: value for name, value in asdict(counted).items() if name not in ("total", "activated")},
        flops_tokens=tokens,
        flops=training_flops(config, tokens),
        paper_flops=paper_flops(config, tokens),
        disagreements=tuple(disagreements(name_or_folder, config)) if printed else (),
        layers=_layers(config),
        cache_elements=2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim,
        files=files,
    )


def _files(folder: str) -> tuple[ModelConfig, Files]:
    refuse_transformers(folder)
    checkpoint = open_checkpoint(folder)
    files = Files(
        folder=str(checkpoint.folder),
        model_type=checkpoint.model_type,
        tensors=len(checkpoint.tensors),
        shards=tuple(sorted({Path(entry.path).name for _, entry in checkpoint.tensors})),
        weight_bytes=checkpoint.nbytes,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        tokenizer=load_tokenizer(checkpoint.folder) is not None,
        notes=checkpoint.notes,
    )
    return checkpoint.config, files


def _layers(config: ModelConfig) -> tuple[LayerGroup, ...]:
    rows = [_layer(block, config) for block in build(config, device="meta").layers if isinstance(block, Block)]
    groups = []
    for row, members in groupby(enumerate(rows), key=lambda member: member[1]):
        indices = [index for index, _ in members]
        feed_forward, attention, total, activated = row
        groups.append(
            LayerGroup(
                first=indices[0],
                last=indices[-1],
                feed_forward=feed_forward,
                attention=attention,
                total=total,
                activated=activated,
            )
        )
    return tuple(groups)


def _layer(block: Block, config: ModelConfig) -> tuple[str, int, int, int]:
    """Kind of the feed-forward, and the parameters of attention, of the whole layer, and of what one token reaches."""
    attention, total = _count(block.self_attn), _count(block)
    if isinstance(block.mlp, MLP):
        return f"dense {config.intermediate_size}", attention, total, total
    parts = []
    idle = 0
    if config.n_routed_experts:
        gate = "hash" if config.hash_routing else f"{config.scoring_func} top"
        parts.append(f"{config.n_routed_experts} routed x {config.moe_intermediate_size}, ")
        parts[-1] += f"{gate}-{config.num_experts_per_tok}"
        experts = _count(block.mlp.experts)
        idle = experts - experts * config.num_experts_per_tok // config.n_routed_experts
    if config.n_shared_experts:
        parts.append(f"{config.n_shared_experts} shared")
    return " + ".join(parts), attention, total, total - idle


def _count(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0
