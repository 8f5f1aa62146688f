"""Inputs of the scenarios: images in files of every kind, truth, lists, and foreign weights.

Made with public libraries alone, since modules of the project may lie elsewhere in another tree.
"""

import csv
import gzip
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
import torch
from PIL import Image

from tests.reference.published_unets import milesial, randomised

Array = np.ndarray[Any, Any]
Random = np.random.Generator

SIZES = ((64, 64), (50, 70), (96, 64), (33, 40), (300, 270), (61, 128))
LARGE_SIDE = 8200
"""More than 64 Mpx, above which a TIFF is read by window."""
NETWORK = '''"""A network of somebody else."""

from torch import nn


def small(in_channels: int = 1, classes: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, classes, 2, stride=2),
    )
'''


def write_inputs(root: Path, seed: int, with_large: bool) -> None:
    """Fill a folder with all that scenarios read but the checkpoints."""
    random = np.random.default_rng(seed)
    _write_all(root, dict(_loose(random)))
    _write_all(root / "awkward", dict(_awkward(random)))
    _write_all(root / "tars", dict(_tars(random)))
    _write_all(root / "tables", dict(_tables(random)))
    _write_all(root / "cells", dict(_cells(random)))
    _write_all(root / "slides", dict(_slides(random)))
    _write_all(root, {"images.csv": _list(root)})
    _write_all(root / "weights", dict(_weights(seed)))
    _write_all(root / "modules", {"their_network.py": NETWORK.encode()})
    if with_large:
        (root / "large").mkdir()
        _write_large(root / "large" / "slide.tif", random)


def _write_all(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


# --- pixels and encodings -------------------------------------------------------------------------


def blobs(height: int, width: int, random: Random, objects: int = 8) -> tuple[Array, Array]:
    """A gray image HW of bright discs under noise, and the discs' numbers HW from 1."""
    y, x = np.mgrid[:height, :width]
    numbers_HW = np.zeros((height, width), np.uint8)
    for number in range(1, objects + 1):
        at_y, at_x = random.uniform(0, height), random.uniform(0, width)
        radius = random.uniform(4, 11)
        numbers_HW[np.hypot(y - at_y, x - at_x) < radius] = number
    light_HW = np.where(numbers_HW > 0, random.uniform(110, 190), 40) + 20 * x / width
    gray_HW = np.clip(random.normal(light_HW, 12), 0, 255).astype(np.uint8)
    return gray_HW, numbers_HW


def image(pixels: Array | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file as Pillow writes it."""
    buffer = io.BytesIO()
    opened = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    opened.save(buffer, format=kind, **options)
    return buffer.getvalue()


def tiff(pixels: Array, **options: Any) -> bytes:
    """A TIFF as tifffile writes it."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **{"photometric": "minisblack", **options})
    return buffer.getvalue()


def rgb(gray_HW: Array) -> Array:
    """Three channels that differ."""
    return np.stack([gray_HW, gray_HW // 2, 255 - gray_HW], -1)


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    """A Parquet file of these columns."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def tar(members: dict[str, bytes], links: tuple[str, ...] = (), mode: Any = "w") -> bytes:
    """A tar of files, and of links that lead nowhere."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "nowhere.png"
            file.addfile(info)
    return buffer.getvalue()


# --- images in folders ----------------------------------------------------------------------------


def _loose(random: Random) -> Iterator[tuple[str, bytes]]:
    """Loose images of several types in ``loose``, and truth of most in ``truth``: 255 is an object,
    7 is ignored; one is of another size.
    """
    for number, shape in enumerate((*SIZES, *SIZES)):
        gray_HW, numbers_HW = blobs(*shape, random)
        name, data = _of_type(number, gray_HW)
        yield f"loose/{name}", data
        truth_HW = np.where(numbers_HW > 0, 255, 0).astype(np.uint8)
        truth_HW[:5, :5] = 7
        if number == 3:
            truth_HW = truth_HW[1:]
        if number != 5:
            yield f"truth/{name.rpartition('.')[0]}.png", image(truth_HW)


def _of_type(number: int, gray_HW: Array) -> tuple[str, bytes]:
    """The name of the so-many-th image, and its file."""
    wide_HW = gray_HW.astype(np.uint16) * 200 + 17
    files: dict[int, tuple[str, Callable[[], bytes]]] = {
        0: ("deep/er/sixteen.png", lambda: image(wide_HW)),
        1: ("colours.jpg", lambda: image(rgb(gray_HW), "JPEG", quality=95)),
        2: ("floats.tif", lambda: tiff(gray_HW.astype(np.float32) / 255)),
        3: ("sixteen.tiff", lambda: tiff(wide_HW, byteorder=">")),
        5: ("with blanks, ü.webp", lambda: image(rgb(gray_HW), "WEBP", lossless=True)),
        6: ("plain.bmp", lambda: image(gray_HW, "BMP")),
        7: ("colours.gif", lambda: image(gray_HW, "GIF")),
    }
    name, make = files.get(number, (f"cell{number:02d}.png", lambda: image(gray_HW)))
    return name, make()


def _awkward(random: Random) -> Iterator[tuple[str, bytes]]:
    """Files in which something is unusual, unsupported or broken."""
    gray_HW, numbers_HW = blobs(70, 90, random)
    colours_HWC, wide_HW = rgb(gray_HW), gray_HW.astype(np.uint16) * 200
    pages_PHW = np.stack([gray_HW, gray_HW[::-1], gray_HW[:, ::-1]])
    alpha_HWC = np.dstack([colours_HWC, numbers_HW * 20])
    yield from _awkward_pillow(gray_HW, colours_HWC, alpha_HWC)
    yield from _awkward_tiffs(gray_HW, colours_HWC, pages_PHW)
    yield "gray16.png", image(wide_HW)
    yield from _broken(image(gray_HW), tiff(wide_HW, compression="zlib", rowsperstrip=8))


def _awkward_pillow(
    gray_HW: Array, colours_HWC: Array, alpha_HWC: Array
) -> Iterator[tuple[str, bytes]]:
    gray, colours = Image.fromarray(gray_HW), Image.fromarray(colours_HWC)
    turned = Image.Exif()
    turned[0x0112] = 6
    yield "rgba.png", image(alpha_HWC)
    yield "la.png", image(Image.merge("LA", [gray, gray]))
    yield "palette.png", image(colours.quantize(32))
    yield "palette_transparent.png", image(colours.quantize(32), transparency=3)
    yield "bits1.png", image(gray.point(lambda v: 255 * (v > 80)).convert("1"))
    yield "bits4.png", image(gray.quantize(16), bits=4)
    yield "cmyk.jpg", image(colours.convert("CMYK"), "JPEG")
    yield "progressive.JPG", image(colours, "JPEG", progressive=True)
    yield "turned.jpg", image(gray, "JPEG", exif=turned)
    yield "interlaced.gif", image(colours.quantize(64), "GIF", interlace=1)
    frames = [gray.rotate(90), gray.rotate(180)]
    yield "frames.gif", image(gray, "GIF", save_all=True, append_images=frames)
    yield "lossy.webp", image(colours, "WEBP", quality=60)
    yield "named_png.tif", image(gray)
    yield "unsupported.ppm", image(colours, "PPM")


def _awkward_tiffs(
    gray_HW: Array, colours_HWC: Array, pages_PHW: Array
) -> Iterator[tuple[str, bytes]]:
    tiles = {"tile": (32, 32)}
    not_finite_HW = gray_HW.astype(np.float32)
    not_finite_HW[3, 4] = np.nan
    five_CHW = np.stack([gray_HW // n for n in range(1, 6)])
    yield "tiles_zlib.tif", tiff(gray_HW, compression="zlib", predictor=True, **tiles)
    yield "strips_lzw.tif", tiff(gray_HW, compression="lzw", rowsperstrip=7)
    yield "tiles_jpeg.tif", tiff(colours_HWC, photometric="ycbcr", compression="jpeg", **tiles)
    yield "zstd.tif", tiff(gray_HW.astype(np.uint16), compression="zstd")
    yield "big.tif", tiff(gray_HW, bigtiff=True)
    yield "planes.tif", tiff(colours_HWC.transpose(2, 0, 1), photometric="rgb", planarconfig=2)
    yield "white_is_zero.tif", tiff(gray_HW, photometric="miniswhite")
    yield "int32.tif", tiff(gray_HW.astype(np.int32) - 100)
    yield "float64.tif", tiff(gray_HW / 7.0)
    yield "not_finite.tif", tiff(not_finite_HW)
    yield "pages.tif", tiff(pages_PHW)
    yield "imagej.tif", tiff(pages_PHW, imagej=True, metadata={"axes": "ZYX"})
    yield "stack.ome.tif", tiff(pages_PHW, ome=True, metadata={"axes": "CYX"})
    yield "channels.tif", tiff(five_CHW, planarconfig=2)


def _broken(png: bytes, tif: bytes) -> Iterator[tuple[str, bytes]]:
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    huge = png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:]
    yield "broken/cut.png", png[: len(png) // 2]
    yield "broken/cut.tif", tif[:-900]
    yield "broken/flipped.png", bytes(flipped)
    yield "broken/huge.png", huge
    yield "broken/empty.png", b""
    yield "broken/text.jpg", b"no image at all\n"
    yield "broken/.hidden.png", png
    yield "notes.txt", b"passed over\n"


# --- images in other files ------------------------------------------------------------------------


def _members(first: int, count: int, random: Random) -> dict[str, bytes]:
    """Members of a tar: images and their truth by turns."""
    found = {}
    for number in range(first, first + count):
        gray_HW, numbers_HW = blobs(*SIZES[number % len(SIZES)], random)
        found[f"cell{number:02d}.png"] = image(gray_HW)
        found[f"cell{number:02d}.mask.png"] = image((numbers_HW > 0).astype(np.uint8))
    return found


def _tars(random: Random) -> Iterator[tuple[str, bytes]]:
    """Whole tars, one packed, one with odd members, one cut short."""
    for number in range(3):
        yield f"shard-{number}.tar", tar(_members(3 * number, 3, random))
    yield "packed.tar.gz", gzip.compress(tar(_members(20, 2, random)), mtime=0)
    odd = _members(30, 2, random) | {"cell32.png": b"broken", "notes.txt": b"no image"}
    yield "odd.tar", tar({**odd, "sub/cell30.png": odd["cell30.png"]}, links=("cell33.png",))
    yield "cut.tar", tar(_members(40, 3, random))[:-14_000]


def _tables(random: Random) -> Iterator[tuple[str, bytes]]:
    """Parquet files with images in a column, as datasets libraries write them."""
    for part in range(2):
        made = [blobs(*shape, random) for shape in SIZES]
        names = [f"{part}-{number}" for number in range(len(made))]
        cells = [
            {"bytes": image(g), "path": f"{n}.png"} for n, (g, _) in zip(names, made, strict=True)
        ]
        if part:
            cells[1:3] = [None, {"bytes": b"broken", "path": "x.png"}]
        truth = [image((numbers > 0).astype(np.uint8)) for _, numbers in made]
        columns = {"image": cells, "truth": truth, "name": names}
        yield f"part-{part}.parquet", parquet(columns, row_group_size=2)


def _cells(random: Random) -> Iterator[tuple[str, bytes]]:
    """Images whose masks have the numbers of their objects, for trainings."""
    for number in range(8):
        gray_HW, numbers_HW = blobs(72, 80, random, objects=6)
        yield f"images/cell{number}.png", image(gray_HW)
        yield f"masks/cell{number}.png", image((numbers_HW > 0).astype(np.uint8))
        yield f"objects/cell{number}.png", image(numbers_HW)
        yield f"classes/cell{number}.png", image(numbers_HW % 3)


def _slides(random: Random) -> Iterator[tuple[str, bytes]]:
    """Two images that take many tiles."""
    for number, shape in enumerate(((700, 530), (400, 650))):
        pixels_HWC = rgb(blobs(*shape, random, objects=40)[0])
        yield f"{number}.tif", tiff(pixels_HWC, photometric="rgb", tile=(64, 64))


def _write_large(path: Path, random: Random) -> None:
    gray_HW = np.tile(blobs(1025, 1025, random, objects=60)[0], (8, 8))
    assert gray_HW.shape == (LARGE_SIDE, LARGE_SIDE)
    path.write_bytes(tiff(gray_HW, tile=(256, 256), compression="zlib"))


def _list(root: Path) -> bytes:
    """A CSV list of loose images, one of which is missing."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["uri", "bytes", "id", "truth"])
    for number in (8, 9, 10, 11):
        path = root / "loose" / f"cell{number:02d}.png"
        truth = f"truth/{path.name}" if number != 9 else ""
        rows.writerow([f"loose/{path.name}", path.stat().st_size, f"listed {number}", truth])
    rows.writerow(["loose/gone.png", 100, "gone", ""])
    return text.getvalue().encode()


# --- networks -------------------------------------------------------------------------------------


def _weights(seed: int) -> Iterator[tuple[str, bytes]]:
    """Weights of published networks with random numbers: one logit of gray, four classes of RGB."""
    torch.manual_seed(seed)
    stem = torch.nn.Conv2d(1, 4, 3, stride=2, padding=1)
    head = torch.nn.ConvTranspose2d(4, 1, 2, stride=2)
    factory = {f"0.{k}": v for k, v in stem.state_dict().items()}
    factory |= {f"2.{k}": v for k, v in head.state_dict().items()}
    yield "gray.pth", saved(randomised(milesial(1, 1, 4, 2), seed).state_dict())
    yield "classes.pth", saved(randomised(milesial(3, 4, 4, 3), seed).state_dict())
    yield "factory.pth", saved(factory)


def saved(state: dict[str, Any]) -> bytes:
    """Weights as PyTorch writes them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
