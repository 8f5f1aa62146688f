"""The cache of decoded segments."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from unet_core.errors import ImageError
from unet_core.images import tiff_segments


def test_the_cache_forgets_what_was_used_least(monkeypatch):
    loaded = []
    cache = tiff_segments.Cache(lambda key: loaded.append(key) or np.zeros(1000, np.uint8), 4000)
    for column in (0, 1, 0, 2, 0, 1):
        cache.get((0, 0, column))
    assert [column for _, _, column in loaded] == [0, 1, 2, 1]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_one_load_serves_all_that_wait_for_it(is_damaged):
    started, go = threading.Event(), threading.Event()
    loads = []

    def load(key):
        loads.append(key)
        started.set()
        go.wait(60)
        if is_damaged:
            raise ImageError("decode", "damaged")

    cache = tiff_segments.Cache(load, 1000)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(cache.get, (0, 0, 0))
        started.wait(60)
        others = [pool.submit(cache.get, (0, 0, 0)) for _ in range(3)]
        while not all(other.running() for other in others):
            pass
        go.set()
        ends = [one.exception() for one in (first, *others)]
    assert [type(end) is ImageError for end in ends] == [is_damaged] * 4
    assert len(loads) == 1 or is_damaged  # who comes after a failure tries again
