"""The few errors that callers catch; each says what, where, both values and the way out."""

from dsmoe_model.errors import CheckpointError, ConfigError


class DsmoeError(Exception):
    """Base of what is raised from here up; the reference model's two (ConfigError, CheckpointError) are ValueErrors."""


class InputError(DsmoeError, ValueError):
    """A tensor handed to an operator has the wrong shape, dtype or device."""


class ArtifactError(DsmoeError, ValueError):
    """An artifact folder is incomplete, altered, newer than this tool, or not an artifact."""


class CaptureError(DsmoeError):
    """A model could not be captured as one graph."""


class VerificationError(DsmoeError):
    """The compiled model is not the model it was compiled from."""


class NotFusedError(DsmoeError):
    """A layer was left alone although `strict` was asked for."""


class TargetError(DsmoeError):
    """A target is unknown, not installed, or cannot do what was asked of it."""


__all__ = [
    "ArtifactError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DsmoeError",
    "InputError",
    "NotFusedError",
    "TargetError",
    "VerificationError",
]
