"""Operators and everything that runs them."""
