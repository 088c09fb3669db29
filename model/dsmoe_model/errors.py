"""What the reference model refuses: configurations and checkpoints that are not what they claim to be."""

from __future__ import annotations


class ConfigError(ValueError):
    """A config value of the wrong type, out of bounds, or at odds with another. Names the fields and both values."""


class CheckpointError(ValueError):
    """A checkpoint folder, index, header or tensor that is refused. Names the file or tensor and what was expected."""
