"""`dsmoe list`: the presets, with parameters and FLOPs counted on the module itself."""

from __future__ import annotations

import argparse

from dsmoe_compiler.cli.console import print_json, print_table, say
from dsmoe_compiler.cli.figures import billions, trillions
from dsmoe_compiler.cli.options import add_json
from dsmoe_model.presets import PRESETS

NAME = "list"
SUMMARY = "presets with parameters and FLOPs"
EXAMPLES = """\
  dsmoe list
  dsmoe list --json
"""

COLUMNS = ("preset", "layers", "hidden", "routed", "top", "shared", "total", "activated", "FLOPs", "per tokens")


def arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from dsmoe_model.accounting import PRINTED, account, disagreements, paper_flops

    rows, found = [], []
    for name, config in PRESETS.items():
        counted = account(config)
        tokens = PRINTED[name].tokens if name in PRINTED else config.max_position_embeddings
        flops = paper_flops(config, tokens)
        found.append(
            {
                "name": name,
                "total": counted.total,
                "activated": counted.activated,
                "tokens": tokens,
                "flops": flops,
                "disagreements": disagreements(name, config) if args.json else [],
                "config": config.to_dict(),
            }
        )
        shape = (config.num_hidden_layers, config.hidden_size, config.n_routed_experts, config.num_experts_per_tok)
        figures = (billions(counted.total), billions(counted.activated), trillions(flops))
        rows.append((name, *map(str, shape), str(config.n_shared_experts), *figures, str(tokens)))
    if args.json:
        print_json(found)
        return 0
    print_table(COLUMNS, rows)
    say("\nFLOPs are of training, forward and backward, as the DeepSeekMoE paper counts them (dsmoe info says how).")
    return 0
