"""The weight map's boundary term by its definition: every distance to every border pixel."""

import numpy as np


def boundary_term(objects_HW, sigma):
    height, width = objects_HW.shape
    distances = []
    for number in np.unique(objects_HW[objects_HW > 0]):
        border = [
            (y, x)
            for y, x in np.argwhere(objects_HW == number)
            for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
            if 0 <= y + dy < height and 0 <= x + dx < width and objects_HW[y + dy, x + dx] != number
        ]
        if border:
            distances.append(
                [[min(np.hypot(y - v, x - u) for v, u in border) for x in range(width)]
                 for y in range(height)]
            )  # fmt: skip
    if len(distances) < 2:
        return np.zeros(objects_HW.shape)
    nearest, second = np.sort(np.array(distances), axis=0)[:2]
    return np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
