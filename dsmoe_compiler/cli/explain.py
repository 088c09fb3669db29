"""`dsmoe explain`: every mixture-of-experts layer with what was matched and fused, or why not."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, replace
from pathlib import Path
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
  dsmoe explain deepseek-moe-tiny --target cpu --stage linalg --layer 1     on its way through torch-mlir
  dsmoe explain path/to/checkpoint --strict --json > layers.json
  dsmoe explain out/tiny                    an artifact: what was fused when it was compiled; of ONNX, each layer's node
"""

log = logging.getLogger(__name__)
STAGES = ("torch", "linalg", "scheduled", "llvm")  # of targets.mlir.stages, which imports torch


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--stage",
        metavar="NAME",
        help="print the graph before and after this pass, or after 'all'; with --target cpu the program at the stage "
        f"{', '.join(STAGES)}",
    )
    parser.add_argument(
        "--target", choices=("cpu",), help="with --stage: on its way to machine code through torch-mlir"
    )
    parser.add_argument("--layer", type=int, metavar="N", help="with --target: this layer only")
    parser.add_argument("--phase", choices=("prefill", "decode"), help="with --target: which program (decode)")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a layer was left alone")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.target is not None or args.layer is not None or args.phase is not None:
        return show_stage(args)
    compiled = (Path(args.model) / "manifest.json").is_file()
    if not compiled:
        check_model(args.model)
    if args.stage is not None:
        check_stage(args.stage, compiled)
    if compiled:
        explanation = remembered(Path(args.model))
    else:
        from dsmoe_compiler.api import explain

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


def show_stage(args: argparse.Namespace) -> int:
    """Print the program of one phase at a stage of the target mlir-cpu, and how long each stage took."""
    if args.target is None:
        raise UsageError("--layer and --phase say what of a program to show: add --target cpu")
    if args.stage not in STAGES:
        raise UsageError(f"--stage {args.stage!r} is none of --target cpu; there are {', '.join(STAGES)}")
    check_model(args.model)

    from dsmoe_compiler.api import show_stage as show

    shown = show(args.model, stage=args.stage, phase=args.phase or "decode", layer=args.layer)
    if args.json:
        print_json(asdict(shown))
        return 0
    say(shown.text)
    for stage, seconds in shown.seconds.items():
        log.info("%s: %.2f s", stage, seconds)
    return 0


def remembered(folder: Path) -> Explanation:
    """What an artifact's manifest says of its layers; an ONNX model's name the nodes that they became."""
    from dsmoe_compiler.artifact import read_manifest
    from dsmoe_compiler.explanation import Explanation, LayerReport
    from dsmoe_runtime.errors import ArtifactError

    manifest = read_manifest(folder)
    try:
        nodes = manifest["onnx"]["nodes"] if "onnx" in manifest else {}
        layers = [LayerReport(**layer) for layer in manifest["layers"]]
        kernels = {layer.name: f"node {nodes[layer.name]}" for layer in layers if layer.name in nodes}
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder} is damaged: its manifest tells no layers ({error}). Compile it again") from None
    return Explanation(tuple(replace(layer, kernel=kernels.get(layer.name, layer.kernel)) for layer in layers), ())


def check_stage(stage: str, compiled: bool) -> None:
    """Raises UsageError naming the passes there are."""
    from dsmoe_passes import pipeline

    if compiled:
        raise UsageError("--stage shows graphs of a model; an artifact has none: name the model that it was made of")
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

    if not explanation.passes:
        return
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
