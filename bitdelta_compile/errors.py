"""Errors a caller may want to catch. Every message names the parameter, what was found, and the way out."""

from __future__ import annotations


class BitDeltaError(Exception):
    """Base class of this package's errors."""


class BaseMismatchError(BitDeltaError):
    """The delta, checkpoint or model belongs to another base."""


class DeltaFileError(BitDeltaError):
    """The file is not a delta this version can read: truncated, malformed, hostile, or of a newer format."""


class UnsupportedError(BitDeltaError):
    """The model, operator or parameter cannot be handled; the message says what can be done instead."""


class CalibrationError(BitDeltaError):
    """Calibration data is missing, empty, or gave values that cannot be fitted."""


class CheckpointError(BitDeltaError):
    """A model's checkpoint (folder, hub id or module) cannot be read."""
