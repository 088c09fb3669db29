"""Comparison: whether several ways to run a model agree, and how fast each is."""

from dsmoe_compiler.compare.result import Comparison
from dsmoe_compiler.compare.run import AGAINST, compare
from dsmoe_compiler.compare.table import render_table

__all__ = ["AGAINST", "Comparison", "compare", "render_table"]
