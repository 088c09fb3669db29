"""`dsmoe compile`: a model in, a verified artifact folder out."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from dsmoe_compiler.cli.console import UsageError, print_json, say
from dsmoe_compiler.cli.figures import byte_size, plural
from dsmoe_compiler.cli.options import (
    DTYPES,
    TARGETS,
    add_dtype,
    add_json,
    add_model,
    add_seed,
    check_model,
    check_target,
    names,
    positive,
)
from dsmoe_runtime.errors import ArtifactError

NAME = "compile"
SUMMARY = "compile a model into a verified artifact folder"
EXAMPLES = """\
  dsmoe compile deepseek-moe-tiny -o out/tiny
  dsmoe compile path/to/checkpoint -o out/model --dtype bf16 --max-seq-len 4096
  dsmoe compile path/to/checkpoint -o out/model --target cuda --strict --json
  dsmoe compile path/to/checkpoint -o out/model --format onnx --dtype fp16
  dsmoe compile path/to/checkpoint -o out/model --format mlir --dtype bf16    for the CPU, through torch-mlir

OUT appears only when the compiled model was found to be the same model; otherwise exit 3 and nothing is left behind.
"""

log = logging.getLogger(__name__)

FORMATS = ("aoti", "onnx", "mlir")
PROFILES = ("portable", "ort-cuda", "ort-contrib")


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the artifact folder to write")
    parser.add_argument("--target", choices=TARGETS, help="what it will run on (cuda where there is a GPU, else cpu)")
    parser.add_argument(
        "--format", type=names, default=("aoti",), metavar="FORMAT", help="what to write (aoti|onnx|mlir)"
    )
    parser.add_argument(
        "--profile", choices=PROFILES, default=PROFILES[0], help="of onnx, what it relies on (portable)"
    )
    parser.add_argument(
        "--level", type=names, metavar="LEVEL", help="of mlir, the instructions (avx2|avx512; avx2,avx512: both)"
    )
    parser.add_argument(
        "--no-function", action="store_true", help="of ort-cuda: without the op's body for other runtimes"
    )
    add_dtype(parser)
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="sequences at a time (1)")
    parser.add_argument(
        "--max-seq-len", type=positive, metavar="N", help="prompt and answer together (at most 512, what the model has)"
    )
    parser.add_argument("--strict", action="store_true", help="exit 1 if a mixture-of-experts layer was left unfused")
    add_seed(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    check_formats(args.format)
    check_model(args.model)
    check_target(args.target)

    from dsmoe_compiler.api import compile as compile_model
    from dsmoe_compiler.artifact import is_artifact
    from dsmoe_compiler.config import CompileConfig
    from dsmoe_compiler.huggingface.folder import Pretrained, is_for_transformers, load_folder
    from dsmoe_compiler.loading import Loaded, load_model, progress_bar
    from dsmoe_compiler.staging import check_place

    try:  # before the minutes of compiling, rather than after
        check_place(args.output, is_artifact)
    except ArtifactError as error:
        raise UsageError(f"-o: {error}") from None

    chosen = {} if args.target is None else {"target": args.target}
    config = CompileConfig(
        **chosen,
        formats=args.format,
        profile=args.profile,
        functions=not args.no_function,
        levels=args.level,
        dtype=DTYPES.get(args.dtype),
        batch_size=args.batch_size,
        max_seq_len=args.max_seq_len,
        strict=args.strict,
        seed=args.seed,
    )
    start = time.perf_counter()
    loaded: Loaded | Pretrained
    if is_for_transformers(args.model):
        loaded = load_folder(args.model, dtype=config.torch_dtype, device=config.capture_device)
    else:
        with progress_bar(f"loading {args.model}") as progress:
            loaded = load_model(
                args.model, dtype=config.torch_dtype, device=config.capture_device, seed=args.seed, progress=progress
            )
    for note in loaded.notes:
        log.info("%s: %s", args.model, note)
    artifact = compile_model(loaded, config=config)
    try:
        artifact.save(args.output)
    finally:
        artifact.discard()
    seconds = time.perf_counter() - start

    if args.json:
        print_json({"output": str(args.output), "seconds": seconds, "manifest": artifact.manifest})
        return 0
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    layers, proof = artifact.manifest["layers"], artifact.manifest["verification"]
    fused = sum(layer["fused"] for layer in layers)
    say(f"{args.output}: verified, {byte_size(size)}, {seconds:.1f} s")
    library = artifact.manifest.get("mlir", {}).get("library", {})
    if library.get("missing"):
        say(f"no libmodel.so: {library['missing']}; then, in {args.output}: {library['command']}")
    say(f"{fused} of {plural(len(layers), 'MoE layer')} fused")
    for check in proof["checks"]:
        say(f"  {check['name']}: {check['detail']}")
    return 0


def check_formats(formats: tuple[str, ...]) -> None:
    """Refuse a format that this version cannot write.

    Raises:
        UsageError: names what there is.
    """
    there = f"this version writes {', '.join(FORMATS)}"
    if not formats:
        raise UsageError(f"--format names no format; {there}")
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"--format {name} is unknown; {there}")
    if len(formats) > 1:
        raise UsageError(f"--format {','.join(formats)}: an artifact has one format; compile once for each")
