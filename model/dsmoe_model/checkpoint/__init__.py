"""Checkpoints: safetensors folders in the layouts of the published models."""
