"""How much memory there is, and what glibc does with what was freed (other C libraries do not)."""

import contextlib
import ctypes
import os
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # from malloc.h
LARGE_BLOCK_BYTES = 4 * 2**20
USUAL_MMAP_MAX = 65536
CGROUP = Path("/sys/fs/cgroup")
LEAST_BYTES = 2**30
"""What is counted on even where less seems to be free."""


def usable_bytes() -> int:
    """Memory that this process may use: the machine's, or what its container may have of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        return min(machine, int((CGROUP / "memory.max").read_text()))
    return machine


def free_bytes() -> int:
    """Memory that can be had now, of the machine, or of the container if that has less; Linux
    only.
    """
    free = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError, IndexError):
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        cached = int((CGROUP / "memory.stat").read_text().partition("inactive_file ")[2].split()[0])
        free = min(free, limit - used + cached)
    return max(free, LEAST_BYTES)


def retain_freed_memory() -> None:
    """Keep what the maps of one batch leave for those of the next, in one heap for all threads
    that begin from now on.

    Each large map would go back to the system, and the next one come page by page, every page
    filled with zeros: up to a third of the time of a network on a CPU.
    """
    _set({M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def return_large_blocks() -> None:
    """Give large blocks back at once: maps of large tiles would pile up."""
    _set({M_MMAP_MAX: USUAL_MMAP_MAX, M_MMAP_THRESHOLD: LARGE_BLOCK_BYTES,
          M_TRIM_THRESHOLD: LARGE_BLOCK_BYTES})  # fmt: skip


def _set(options: dict[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in options.items():
            libc.mallopt(option, value)
