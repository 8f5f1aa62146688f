"""How much memory there is, and what glibc does with what was freed (other C libraries do not)."""

import contextlib
import ctypes
import os
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # from malloc.h
LARGE_BLOCK_BYTES = 4 * 2**20
USUAL_MMAP_MAX = 65536


def usable_bytes() -> int:
    """Memory that this process may use: the machine's, or what its container may have of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(machine, int(text)) if text.isdigit() else machine


def keep_freed() -> None:
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
