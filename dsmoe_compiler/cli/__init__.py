"""The command `dsmoe`: one file a verb, the result on stdout, the log on stderr."""

from dsmoe_compiler.cli.main import main

__all__ = ["main"]
