"""Targets: what turns a fused graph into code."""
