"""`dsmoe build-ort`: the library with which ONNX Runtime runs our operator fast."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from dsmoe_compiler.cli.console import UsageError, say

NAME = "build-ort"
SUMMARY = "build the library with which ONNX Runtime runs dsmoe::DsMoE fast"
EXAMPLES = """\
  dsmoe build-ort
  dsmoe build-ort -o libdsmoe_ort.so
  CXX=clang++ dsmoe build-ort

The library needs a C++ compiler to be built and nothing to run. Without
our package:

  options = onnxruntime.SessionOptions()
  options.register_custom_ops_library("./libdsmoe_ort.so")
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="copy the library to FILE (else it is in the cache)"
    )


def run(args: argparse.Namespace) -> int:
    output: Path | None = args.output
    if output is not None and output.is_dir():
        raise UsageError(f"{output} is a folder; name a file, {output / 'libdsmoe_ort.so'} say")
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"{output}: the folder {output.parent} does not exist; make it first")

    from dsmoe_runtime.ort_library.build import library

    built = library()
    if output is None:
        say(str(built))
        return 0
    partial = output.with_name(f".{output.name}.partial")
    shutil.copyfile(built, partial)
    partial.replace(output)
    say(str(output))
    return 0
