"""What a process of Ray answers instead of raising: what Ray raises again may lose its class."""

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from unet_core.errors import UnetJobsError

log = logging.getLogger(__name__)

Given = ParamSpec("Given")
ResultT = TypeVar("ResultT")


class CrashError(Exception):
    """Something went wrong with the process rather than with the run: memory, or the device."""


Problem = UnetJobsError | CrashError


def recorded(call: Callable[Given, ResultT]) -> Callable[Given, ResultT | Problem]:
    """A function that returns what goes wrong; bugs are raised."""

    @functools.wraps(call)
    def answered(*given: Given.args, **named: Given.kwargs) -> ResultT | Problem:
        try:
            return call(*given, **named)
        except UnetJobsError as error:
            return error
        except (MemoryError, RuntimeError) as error:  # torch's device errors are RuntimeErrors
            log.exception("the actor cannot go on")
            return CrashError(f"{type(error).__name__}: {error}")

    return answered
