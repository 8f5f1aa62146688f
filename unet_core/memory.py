"""What glibc does with memory that was freed; another C library does what it does."""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # from malloc.h
LARGE_BLOCK_BYTES = 4 * 2**20
USUAL_MMAP_MAX = 65536


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
