"""`dsmoe explain`: every mixture-of-experts layer with what was matched and fused, or why not."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from dsmoe_compiler.cli.console import UsageError, print_json, print_table, say
from dsmoe_compiler.cli.figures import plural
from dsmoe_compiler.cli.options import add_json, add_model, check_model

if TYPE_CHECKING:
    from dsmoe_compiler.explanation import Explanation

NAME = "explain"
SUMMARY = "every MoE layer: what was matched, what was fused, why not; the graph before and after a pass"
EXAMPLES = """\
  dsmoe explain deepseek-moe-tiny
  dsmoe explain deepseek-moe-tiny --stage fuse_moe
  dsmoe explain path/to/checkpoint --strict --json > layers.json
"""

log = logging.getLogger(__name__)


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--stage", metavar="PASS", help="print the graph before and after this pass, or after 'all'")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a layer was left alone")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    check_model(args.model)

    from dsmoe_compiler.api import explain

    if args.stage is not None:
        check_stage(args.stage)
    explanation = explain(args.model, stage=args.stage)
    if args.json:
        print_json(explanation.to_dict())
    else:
        _print(explanation, with_graphs=args.stage is not None)
    if args.strict and explanation.left_alone:
        names = ", ".join(layer.name for layer in explanation.left_alone)
        log.error("--strict: %s left alone: %s", plural(len(explanation.left_alone), "layer"), names)
        return 1
    return 0


def check_stage(stage: str) -> None:
    """Raises UsageError naming the passes there are."""
    from dsmoe_passes import pipeline

    passes = [run_pass.__name__ for run_pass in pipeline.PIPELINE]
    if stage not in (*passes, "all"):
        raise UsageError(f"--stage {stage!r} is no pass; there are {', '.join(passes)}, and all")


def _print(explanation: Explanation, *, with_graphs: bool) -> None:
    rows = [
        (layer.name, "fused" if layer.fused else "left alone", layer.pattern, layer.operator or "-", layer.kernel)
        for layer in explanation.layers
    ]
    print_table(("layer", "", "matched", "operator", "runs as"), rows)
    for layer in explanation.layers:
        if layer.reason:
            where, advice = f" (at {layer.node})" if layer.node else "", f". {layer.advice}" if layer.advice else ""
            say(f"{layer.name}: {layer.reason}{where}{advice}")
    say(explanation.summary)
    for note in explanation.notes:
        say(f"note: {note}")

    say("")
    print_table(
        ("graph", "pass", "rewritten", "refused", "ms"),
        [
            (step.graph, step.name, str(step.rewritten), str(step.refused), f"{1e3 * step.seconds:.1f}")
            for step in explanation.passes
        ],
    )
    for step in explanation.passes:
        for when, graph in (("before", step.graph_before), ("after", step.graph_after)):
            if with_graphs and graph is not None:
                say(f"\n# {step.graph}, {when} {step.name}\n{graph}")
