"""`dsmoe info`: what a preset, a checkpoint folder or an artifact is, before anything runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dsmoe_compiler.cli.console import print_json, print_table, say
from dsmoe_compiler.cli.figures import billions, byte_size, trillions
from dsmoe_compiler.cli.options import add_json, check_model

if TYPE_CHECKING:
    from dsmoe_compiler.description import Description

NAME = "info"
SUMMARY = "parameters, FLOPs, layers and cache of a model; what a checkpoint folder holds"
EXAMPLES = """\
  dsmoe info deepseek-moe-16b
  dsmoe info path/to/checkpoint --json

Nothing is allocated: models are built on the meta device, and of a checkpoint only config and headers are read.
"""

BYTES = {"fp32": 4, "bf16": 2}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a preset's name or a checkpoint folder")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    check_model(args.model)

    from dsmoe_compiler.description import describe

    found = describe(args.model)
    if args.json:
        print_json(found.to_dict())
    else:
        _print(found)
    return 0


def _print(found: Description) -> None:
    config, tokens = found.config, found.flops_tokens
    say(f"{found.name}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, vocabulary {config.vocab_size}")
    say(f"\nparameters {found.total:,} ({billions(found.total)}), of which a token reaches")
    say(f"           {found.activated:,} ({billions(found.activated)})")
    for part, value in found.parts.items():
        if value:
            say(f"  {part.replace('_', ' '):16} {value:>18,}")
    weights = ", ".join(f"{byte_size(found.total * size)} in {name}" for name, size in BYTES.items())
    say(f"weights    {weights}")
    say(
        f"cache      {found.cache_elements:,} values a token; {config.max_position_embeddings} tokens take "
        + ", ".join(
            f"{byte_size(found.cache_elements * config.max_position_embeddings * size)} in {name}"
            for name, size in BYTES.items()
        )
    )
    say(f"FLOPs      {trillions(found.paper_flops)} for {tokens} tokens of training, as the DeepSeekMoE paper counts")
    say("           (6NT + 12L(AD)T^2 + 6VHT: non-causal attention, the head but not the input embedding)")
    say(f"           {trillions(found.flops)} with every width as built")
    for sentence in found.disagreements:
        say(f"           {sentence}")
    say("")
    rows = [
        (
            f"{group.first}" if group.first == group.last else f"{group.first}-{group.last}",
            group.feed_forward,
            f"{group.attention:,}",
            f"{group.total:,}",
            f"{group.activated:,}",
        )
        for group in found.layers
    ]
    print_table(("layers", "feed-forward", "attention", "parameters each", "activated each"), rows)
    if found.files is not None:
        files = found.files
        say(f"\n{files.folder}")
        say(f"  {files.tensors:,} tensors in {len(files.shards)} files, {byte_size(files.weight_bytes)}, {files.dtype}")
        say(f"  model_type {files.model_type}, tokenizer {'there' if files.tokenizer else 'missing'}")
        for note in files.notes:
            say(f"  note: {note}")
