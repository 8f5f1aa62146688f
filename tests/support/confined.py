"""Code that is not trusted with memory, time or this process: one call in a child of its own.

The children come from a fork server that has imported everything once, so a call costs some
milliseconds and begins with the same memory.
"""

import contextlib
import math
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

MIB = 2**20
MEMORY = 512 * MIB
SECONDS = 20.0
"""Of a child's own computing, of which a busy machine gives it no more than an idle one."""
PATIENCE = 300.0
"""Seconds of the clock, for a child that waits without computing."""
PRELOADED = ["tests.support.doors", "tests.support.data", "tests.support.rank"]
"""By all who have children from it: there is one fork server, and who is first starts it."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended; ``error`` and ``text`` are those of what it raised."""

    value: Any = None
    error: str = ""
    text: str = ""
    memory: int = 0
    """Bytes by which the child grew at most."""


def confined(
    call: Callable[..., Any], *args: Any, memory: int = MEMORY, seconds: float = SECONDS
) -> Outcome:
    """Call; ``memory`` bytes on top of what the child begins with, ``seconds`` of computing."""
    context = fork_server()
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, memory, seconds, call, args))
    child.start()
    theirs.close()
    try:
        if not ours.poll(PATIENCE):
            return Outcome(error="timeout", text=f"no end after {PATIENCE:g} s")
        return ours.recv()
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGXCPU:
            return Outcome(error="timeout", text=f"no end after {seconds:g} s of computing")
        return Outcome(error="died", text=f"exit code {child.exitcode}")
    finally:
        child.kill()
        child.join()


def fork_server() -> Any:
    """Return the context whose children come from the fork server, and start it if need be.

    It starts in the project's folder: Python 3.11 does not hand ``sys.path`` on to it, and passes
    over in silence what it cannot import, so every child would import everything again.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # others take 1 GiB beforehand
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with contextlib.chdir(Path(__file__).parents[2]):
        forkserver.ensure_running()
    return context


def limit_memory(room: int) -> int:
    """Let this process have so many bytes more; returns its resident bytes."""
    data = status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (data + room, data + room))
    return status("VmRSS")


def status(name: str) -> int:
    """A figure of this process in bytes."""
    with open("/proc/self/status") as lines:
        (found,) = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found) * 1024


def limit_computing(seconds: float) -> None:
    """Let this process compute for so long from now on; SIGXCPU ends it then."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(own.ru_utime + own.ru_stime + seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def _child(
    connection: Any, memory: int, seconds: float, call: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    limit_computing(seconds)
    begun = limit_memory(memory)
    try:
        found = Outcome(call(*args))
    except BaseException as error:
        found = Outcome(error=type(error).__name__, text=str(error))
    grown = status("VmHWM") - begun
    connection.send(Outcome(found.value, found.error, found.text, grown))
