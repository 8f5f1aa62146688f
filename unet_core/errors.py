"""What goes wrong. Decisions go by class, not by the words of a message (but for
``actors.NODE_DIED``: Ray has no class for it).
"""

import re
from typing import Literal

Circumstance = Literal[
    "worker_died", "timeout", "out_of_memory",
    "missing", "changed", "archived", "forbidden", "truth",
]  # fmt: skip
"""Codes of failures that one attempt may meet and another not."""
ErrorCode = Literal[
    Circumstance,
    "empty", "decode", "unsupported", "too_large", "frames", "mode", "channels", "axes",
    "not_finite", "labels", "statistics", "duplicate_id", "not_a_file", "tar", "parquet",
]  # fmt: skip
"""Why an image failed; ``labels``, of a mask, becomes ``truth`` in the row of its image."""


class UnetJobsError(Exception):
    """Base of every error that this project raises on purpose; the text is for people."""

    exit_code = 1
    """Of the command that it ends."""


class ConfigError(UnetJobsError, ValueError):
    """The config is wrong; the message lists every problem, one a line. Validators may raise it."""

    exit_code = 2


class CheckpointError(UnetJobsError):
    """A checkpoint is missing, damaged, foreign or of a shape that its header denies."""

    exit_code = 2


class RunMismatchError(UnetJobsError):
    """The folder has another identity, manifest, device or versions."""

    exit_code = 2


class StoreError(UnetJobsError):
    """A path is missing, not readable or not writable."""

    exit_code = 3


class ObjectError(StoreError):
    """One object cannot be read; the store itself may be well."""

    code: Circumstance
    """Error code of the row of an image that is this object."""


class NotFoundError(ObjectError):
    """There is no such object."""

    code = "missing"


class ChangedError(ObjectError):
    """An object was written again since it was listed."""

    code = "changed"


class ArchivedError(ObjectError):
    """An object must be restored before it can be read."""

    code = "archived"


class ForbiddenError(ObjectError):
    """Access to an object is denied; perhaps to all of them."""

    code = "forbidden"


class ParquetDamagedError(StoreError):
    """A file is no Parquet file, or a damaged one."""


class ShardError(UnetJobsError):
    """A shard cannot be segmented, and no row could say so honestly; a run sets it aside."""


class CommitConflictError(UnetJobsError):
    """A shard is already committed with other bytes: repeatability is broken, so stop."""


class DivergedError(UnetJobsError):
    """The loss of a training is NaN or infinite; the last good checkpoint is kept."""


class WorkersError(UnetJobsError):
    """Workers cannot do the work: no cluster, no room, other code, too little memory, or they die
    while starting.
    """


class StoppedError(UnetJobsError):
    """Work was given up because someone asked for it; the same command continues."""

    exit_code = 130


class ImageError(UnetJobsError):
    """One image cannot be segmented: a failed row with this ``error_code``, never a run's end."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: ErrorCode = code

    def __reduce__(self) -> tuple[type, tuple[ErrorCode, str]]:
        return type(self), (self.code, str(self))


def one_line(error: BaseException) -> str:
    """The words of a library without what changes from run to run: rows must be repeatable."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:300]


def few(names: list[str], shown: int = 3) -> str:
    """Join the first names, and say how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
