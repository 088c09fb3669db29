"""The report: one HTML page that needs nothing but a browser."""

from dsmoe_compiler.report.page import render, write_report

__all__ = ["render", "write_report"]
