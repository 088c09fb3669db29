"""`dsmoe compile`: a model in, a verified artifact folder out."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from dsmoe_compiler.cli.console import UsageError, print_json, say
from dsmoe_compiler.cli.figures import byte_size
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

NAME = "compile"
SUMMARY = "compile a model into a verified artifact folder"
EXAMPLES = """\
  dsmoe compile deepseek-moe-tiny -o out/tiny
  dsmoe compile path/to/checkpoint -o out/model --dtype bf16 --max-seq-len 4096
  dsmoe compile path/to/checkpoint -o out/model --target cuda --strict --json

OUT appears only when the compiled model was found to be the same model; otherwise exit 3 and nothing is left behind.
"""

FORMATS = ("aoti",)
LATER = ("onnx", "mlir")


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the artifact folder to write")
    parser.add_argument("--target", choices=TARGETS, help="what it will run on (cuda where there is a GPU, else cpu)")
    parser.add_argument("--format", type=names, default=FORMATS, metavar="FORMAT,...", help="what to write (aoti)")
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
    check_output(args.output)
    check_target(args.target)

    from dsmoe_compiler.api import compile as compile_model
    from dsmoe_compiler.config import CompileConfig

    chosen = {} if args.target is None else {"target": args.target}
    config = CompileConfig(
        **chosen,
        formats=args.format,
        dtype=DTYPES[args.dtype],
        batch_size=args.batch_size,
        max_seq_len=args.max_seq_len,
        strict=args.strict,
        seed=args.seed,
    )
    start = time.perf_counter()
    artifact = compile_model(args.model, config=config)
    artifact.save(args.output)
    seconds = time.perf_counter() - start

    if args.json:
        print_json({"output": str(args.output), "seconds": seconds, "manifest": artifact.manifest})
        return 0
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    say(f"{args.output}: verified, {byte_size(size)}, {seconds:.1f} s")
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
        if name in LATER:
            raise UsageError(f"--format {name} is not there yet; {there}")
        if name not in FORMATS:
            raise UsageError(f"--format {name} is unknown; {there}")


def check_output(folder: Path) -> None:
    """Refuse a folder that saving would refuse, before the minutes of compiling rather than after.

    Raises:
        UsageError: it is a file, or a folder with something else in it.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"-o {folder}: exists and is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "manifest.json").is_file():
        raise UsageError(f"-o {folder}: holds files and is no artifact; name a new folder")
