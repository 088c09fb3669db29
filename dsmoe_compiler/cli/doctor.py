"""`dsmoe doctor`: what this machine can run, what is missing, and how to get it."""

from __future__ import annotations

import argparse

from dsmoe_compiler.cli.console import print_json, say
from dsmoe_compiler.cli.options import add_json

NAME = "doctor"
SUMMARY = "what this machine can run, what is missing and how to get it"
EXAMPLES = """\
  dsmoe doctor
  dsmoe doctor --json > environment.json
"""

GIB = 2**30


def arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from dsmoe_compiler.environment import examine

    environment = examine()
    if args.json:
        print_json(environment.to_dict())
        return 0

    say(f"dsmoe {environment.dsmoe}, Python {environment.python}, {environment.system}")
    say(f"torch {environment.torch}, {environment.torch_threads} threads, CUDA {environment.torch_cuda or 'none'}")
    say(f"CPU   {environment.cpu}, {environment.cores} cores, {environment.vector_isa}")
    say(f"RAM   {environment.memory_bytes / GIB:.1f} GiB")
    for index, gpu in enumerate(environment.gpus):
        say(f"GPU {index} {gpu.name}, {gpu.memory_bytes / GIB:.1f} GiB, compute capability {gpu.capability}")

    say("\nCan run")
    for ability in environment.abilities:
        say(f"  {'yes' if ability.ok else 'no ':3}  {ability.name:32} {ability.detail}")
        if ability.remedy:
            say(f"       {'':32} -> {ability.remedy}")

    say("\nOptional packages")
    for package in environment.packages:
        say(f"  {package.name:14} {package.version or '-':12} {package.needed_for}")
        if package.version is None:
            say(f"  {'':14} {'':12} -> {package.install}")

    say("\nCaches")
    for cache in environment.caches:
        state = "not made yet" if not cache.exists else "private" if cache.private else "OTHERS MAY WRITE HERE"
        say(f"  {cache.what:9} {cache.path} ({state}{'' if cache.writable else ', not writable'})")
    return 0
