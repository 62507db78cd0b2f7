"""The one tree of errors a user can act on.

Every message is one line that says what was found, what was expected and what to do. The command prints it without a
traceback; anything outside this tree is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class CounterfakeError(Exception):
    """Root of the tree. `str(error)` is the whole message for a person."""


class ConfigError(CounterfakeError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class StorageError(CounterfakeError):
    """Object storage or the file system did not do what was asked."""


class NotFoundError(StorageError):
    """The object, dataset, version or file does not exist."""


class CorruptError(StorageError):
    """Bytes do not have the digest they were written with."""


class StorageTimeoutError(StorageError, TimeoutError):
    """The total deadline of a storage call passed."""


class DataError(CounterfakeError):
    """A dataset cannot be used as asked: no rows, missing labels, mixed sizes, an unknown schema."""


class MediaError(CounterfakeError):
    """Untrusted bytes were refused. `reason` is the short machine-readable word."""

    REASONS = ("empty", "too_large", "too_small", "unsupported", "undecodable", "bomb", "too_slow")

    def __init__(self, reason: str, message: str) -> None:
        assert reason in self.REASONS, f"unknown media error reason {reason!r}"
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        return type(self), (self.reason, str(self))


class CheckpointError(CounterfakeError):
    """A checkpoint or bundle is incomplete, altered, or of another architecture."""


class TrainingError(CounterfakeError):
    """Training cannot go on; the last checkpoint is good."""


class NonFiniteError(TrainingError):
    """A loss or metric became NaN or infinite."""


class CollapseError(TrainingError):
    """A learner found that it learns nothing any more, or destroys what it had learned."""


class ClusterError(CounterfakeError):
    """The cluster cannot run what was asked: unreachable, or too few resources."""


class TrackingError(CounterfakeError):
    """The MLflow server or file cannot be used."""


class RegistryError(TrackingError):
    """A model, version or alias does not exist, or another writer was faster."""


class GateError(RegistryError):
    """A model did not pass the gate before an alias. The message lists every failed condition."""


class ServiceError(CounterfakeError):
    """The detection service cannot start or does not answer."""
