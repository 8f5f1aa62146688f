"""What a process of Ray answers instead of raising: exceptions may lose their cause on the way."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from unet_core import errors
from unet_core.errors import ShardError, UnetJobsError

log = logging.getLogger(__name__)

Given = ParamSpec("Given")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Failure:
    """An error of this project that stops the run, as a plain record."""

    kind: str
    message: str

    def raise_again(self) -> None:
        """Raise it where it is understood."""
        raise getattr(errors, self.kind)(self.message)


@dataclass(frozen=True)
class Crash:
    """Something went wrong with the process rather than with the run: memory, or the device."""

    reason: str


@dataclass(frozen=True)
class Refusal:
    """One shard cannot be done; the run goes on without it."""

    reason: str


Problem = Failure | Crash | Refusal


def recorded(call: Callable[Given, ResultT]) -> Callable[Given, ResultT | Problem]:
    """A function that returns what goes wrong as a record; bugs are raised."""

    @functools.wraps(call)
    def answered(*given: Given.args, **named: Given.kwargs) -> ResultT | Problem:
        try:
            return call(*given, **named)
        except ShardError as error:
            return Refusal(str(error))
        except UnetJobsError as error:
            return Failure(type(error).__name__, str(error))
        except (MemoryError, RuntimeError) as error:  # torch's device errors are RuntimeErrors
            log.exception("the actor cannot go on")
            return Crash(f"{type(error).__name__}: {error}")

    return answered
