"""Triton kernels of the operators. Nothing outside this package imports it with a module: Triton is optional."""
