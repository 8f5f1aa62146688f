"""COCO's detection format: annotations of one image, and the document that they are put into."""

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
from scipy import ndimage

from unet_core.arrays import Array
from unet_core.errors import ConfigError
from unet_core.export.instances import EVERYWHERE, place
from unet_core.storage.spool import reports_full_disk, spooled
from unet_core.tiling.geometry import Slices

Row = dict[str, Any]
Points = list[tuple[int, int]]

STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))
"""(y, x) along the sides of a pixel with the pixel to the right: its upper, right, lower, left."""


def require_library() -> Any:
    """The masks of pycocotools; raises ConfigError with the way to get them."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ConfigError(
            "--format coco needs pycocotools: pip install 'unet-jobs[coco]'"
        ) from error
    return mask


def annotation(
    class_id: int, box: Slices, region_HW: Array, shape: tuple[int, int], as_polygons: bool
) -> Row:
    """A row of ``schema.ANNOTATION`` for a region of an image of that shape."""
    rows, columns = box
    segmentation: Any = rle(region_HW, rows.start, columns.start, *shape)
    if as_polygons:
        segmentation = [
            [value for y, x in points for value in (x, y)]
            for points in polygons(region_HW, rows.start, columns.start)
        ]
    return {
        "class": class_id,
        "area": int(region_HW.sum()),
        **place(box)._asdict(),
        "segmentation": json.dumps(segmentation, separators=(",", ":")),
    }


def rle(region_HW: Array, y: int, x: int, height: int, width: int) -> Row:
    """COCO's compressed run lengths, column by column, of a region at (y, x) of an image."""
    edges_WH = np.diff(np.pad(region_HW.T, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, stops = (
        (columns + x) * height + rows + y
        for columns, rows in (np.nonzero(edges_WH == step) for step in (1, -1))
    )
    is_new = np.ones(len(starts), bool)  # a run that reaches the last row goes on in the first
    is_new[1:] = starts[1:] != stops[:-1]
    runs = np.stack([starts[is_new], np.append(stops[:-1][is_new[1:]], stops[-1:])], axis=1)
    counts = np.diff(runs.ravel(), prepend=0, append=height * width)
    counts = counts[: counts.size - (counts[-1] == 0)]  # as pycocotools' own
    size = [height, width]
    found = require_library().frPyObjects({"size": size, "counts": counts.tolist()}, *size)
    return {"size": size, "counts": found["counts"].decode("ascii")}


def polygons(region_HW: Array, y: int, x: int) -> list[Points]:
    """Outlines along the borders of pixels, as corners (y, x) of the image.

    COCO's polygons have no holes and are joined: a region is cut in strips through its holes, so
    that every hole is open to a side.
    """
    holes_HW = ndimage.binary_fill_holes(region_HW, EVERYWHERE) & ~region_HW
    holes = ndimage.find_objects(ndimage.label(holes_HW, EVERYWHERE)[0])
    cuts = sorted({0, region_HW.shape[1], *(columns.start for _, columns in holes)})
    return [
        [(row + y, column + left + x) for row, column in points]
        for left, right in pairwise(cuts)
        for points in _outlines(region_HW[:, left:right])
    ]


def _outlines(region_HW: Array) -> Iterator[Points]:
    """Closed walks with the region to the right; where two pixels meet at a corner only, each is
    walked around by itself.
    """
    order = [*_sides(region_HW)]
    left = set(order)
    for first in order:
        if first not in left:
            continue
        way = first
        points: Points = []
        while way != first or not points:
            left.discard(way)
            (y, x), direction = way
            y, x = y + STEPS[direction][0], x + STEPS[direction][1]
            ways = [((y, x), (direction + turn) % 4) for turn in (1, 0, 3)]
            way = next(way for way in ways if way in left or way == first)
            if way[1] != direction:
                points.append((y, x))
        yield points


def _sides(region_HW: Array) -> Iterator[tuple[tuple[int, int], int]]:
    """Start and direction of each side of a pixel that has the region on one side only."""
    padded_HW = np.pad(region_HW, 1)
    for direction, (dy, dx) in enumerate(((-1, 0), (0, 1), (1, 0), (0, -1))):
        is_border = padded_HW & ~np.roll(padded_HW, (-dy, -dx), axis=(0, 1))
        y0, x0 = ((0, 0), (0, 1), (1, 1), (1, 0))[direction]
        for y, x in np.argwhere(is_border[1:-1, 1:-1]).tolist():
            yield (y + y0, x + x0), direction


@reports_full_disk()
def document(
    class_names: tuple[str, ...], digest: str, images: Iterable[Row], annotations: Iterable[Row]
) -> BinaryIO:
    """The whole of ``annotations.json``, written as its rows come.

    ``digest``: of the shards and masks that it is made of. ``images``: id, file_name, height,
    width. ``annotations``: rows of ``schema.ANNOTATION`` with the id of their image; they are
    numbered here.
    """
    file = spooled()
    head = {
        "info": {"description": "made by unet-jobs", "shards": digest},
        "licenses": [],
        "categories": [{"id": n, "name": name} for n, name in enumerate(class_names) if n],
    }
    file.write(json.dumps(head).removesuffix("}").encode() + b',\n"images":[')
    _write(file, map(json.dumps, images))
    file.write(b'],\n"annotations":[')
    _write(file, (_entry(number, row) for number, row in enumerate(annotations, start=1)))
    file.write(b"]}\n")
    return file


def _write(file: BinaryIO, entries: Iterable[str]) -> None:
    for number, entry in enumerate(entries):
        file.write(f"{',' * (number > 0)}\n{entry}".encode())


def _entry(number: int, row: Row) -> str:
    told = {
        "id": number,
        "image_id": row["image"],
        "category_id": row["class"],
        "area": row["area"],
        "bbox": [row[side] for side in ("x", "y", "width", "height")],
        "iscrowd": 0,
    }
    return f'{json.dumps(told)[:-1]}, "segmentation": {row["segmentation"]}}}'
