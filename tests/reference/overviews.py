"""Obvious twin of the overviews of masks: each block of pixels is counted by itself."""

from collections import Counter

import numpy as np


def halved(ids_HW: np.ndarray, nodata: int | None) -> np.ndarray:
    """The most frequent id of each block of 2 × 2 pixels but nodata; of several, the smallest."""
    height, width = ids_HW.shape
    small_HW = np.zeros((-(-height // 2), -(-width // 2)), ids_HW.dtype)
    for y, x in np.ndindex(small_HW.shape):
        rows = [2 * y, min(2 * y + 1, height - 1)]
        columns = [2 * x, min(2 * x + 1, width - 1)]
        counts = Counter(ids_HW[np.ix_(rows, columns)].ravel().tolist())
        counts.pop(nodata, None)
        small_HW[y, x] = min(counts, key=lambda i: (-counts[i], i)) if counts else nodata
    return small_HW
