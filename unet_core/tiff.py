"""TIFF in its many shapes: pages, channels, axes and colours, through tifffile.

Axes by tifffile's letters: Y rows, X columns, S samples, C channels; all others are pages.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from unet_core.errors import ImageError

VALUES_PER_PIXEL = 8
"""A file's pages and channels together hold at most this many times ``max_pixels`` values."""


@dataclass(frozen=True)
class Rules:
    """How files are read; from ``input`` of the config."""

    max_pixels: int
    channels: tuple[int, ...] = ()
    """Which channels count, as stored (alpha too); empty: gray or RGB without alpha, or all."""
    pages: str = "refuse"
    """What several pages or frames of a TIFF are: ``refuse`` or ``expand`` into images."""
    axes: str = ""
    """Axes of TIFFs that do not say them, e.g. ``CYX``; empty: OME and ImageJ metadata."""


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise ImageError for images without pixels, or with too many."""
    if width * height > max_pixels:
        raise ImageError(
            "too_large",
            f"{height} × {width} pixels, allowed: {max_pixels} in all; raise input.max_pixels",
        )
    if not width or not height:
        raise ImageError("decode", f"an image of {height} × {width} pixels has nothing to segment")


def decode_tiff(data: bytes, rules: Rules, as_labels: bool) -> list[Any]:
    """Arrays HW or HWC, one for each page.

    Raises ImageError for pages that are refused, and axes or colours that are not understood.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        pages: list[Any] = [p for p in tiff.pages if not getattr(p, "is_reduced", False)]
        pages = pages or [tiff.pages.first]
        for page in pages:
            check_size(page.imagewidth, page.imagelength * page.imagedepth, rules.max_pixels)
        series = [
            s for s in tiff.series if s.pages and not getattr(s.keyframe, "is_reduced", False)
        ]
        is_declared = bool(rules.axes or tiff.is_ome or tiff.is_imagej)
        _check_values(pages, series, rules)
        if (len(pages) > 1 and is_declared) or sum(map(_planes, series)) > len(pages):
            stacks = [page for one in series for page in _stack(one, len(series), rules, as_labels)]
            _require_allowed(len(stacks), rules)
            return stacks
        _require_allowed(len(pages), rules)
        return [_page(page, rules, as_labels) for page in pages]


def _check_values(pages: list[Any], series: list[Any], rules: Rules) -> None:
    """All pages and channels together, before any is decoded."""
    by_pages = sum(p.imagewidth * p.imagelength * p.samplesperpixel for p in pages)
    values = max(by_pages, sum(int(np.prod(s.shape, dtype=np.int64)) for s in series))
    allowed = VALUES_PER_PIXEL * rules.max_pixels
    if values > allowed:
        raise ImageError(
            "too_large", f"{values} values in all pages and channels, allowed: {allowed}"
        )


def _planes(series: Any) -> int:
    """How many images of Y and X a series has, samples apart."""
    sizes = zip(series.shape, series.axes, strict=True)
    return int(np.prod([size for size, axis in sizes if axis not in "YXS"]))


def _require_allowed(pages: int, rules: Rules) -> None:
    if pages > 1 and rules.pages == "refuse":
        raise ImageError(
            "frames",
            f"the TIFF holds {pages} pages; input.pages = 'expand' makes each an image, "
            "input.axes = 'CYX' makes them channels",
        )


def _stack(series: Any, number_of_series: int, rules: Rules, as_labels: bool) -> list[Any]:
    """Planes whose meaning is declared: channels are joined, every other axis is pages."""
    axes, shape = rules.axes or series.axes, series.shape
    is_wrong = len(axes) != len(shape) or "Y" not in axes or "X" not in axes
    if is_wrong or (rules.axes and number_of_series > 1):
        found = series.axes if number_of_series == 1 else f"{number_of_series} sizes of pages"
        raise ImageError("axes", f"the TIFF has shape {shape} and {found}, which is not {axes}")
    _require_plain(series)
    others = [i for i, axis in enumerate(axes) if axis not in "YXCS"]
    channels = [i for i, axis in enumerate(axes) if axis in "CS"]
    order = [*others, axes.index("Y"), axes.index("X"), *channels]
    pixels = np.transpose(series.asarray(), order)
    height, width = pixels.shape[len(others) : len(others) + 2]
    depth = int(np.prod([shape[i] for i in channels]))
    pages_NHWC = pixels.reshape(-1, height, width, depth)
    if _alpha_of(series.keyframe) and "C" not in axes and not rules.channels:
        pages_NHWC = pages_NHWC[..., :-1]
    if pages_NHWC.dtype == bool:
        pages_NHWC = pages_NHWC.astype(np.uint8) * (1 if as_labels else 255)
    return list(pages_NHWC)


def _require_plain(series: Any) -> None:
    """Raise ImageError for a stack of colours that only single pages may have, or with gaps."""
    page = series.keyframe
    colors = _name(page.photometric)
    if colors not in ("MINISBLACK", "RGB", "0") or page.bitspersample in (2, 4):
        raise ImageError(
            "mode", f"a stack of {colors} at {page.bitspersample} bits is not supported"
        )
    if any(plane is None for plane in series.pages):
        raise ImageError("frames", "planes of the stack are missing; they lie in other files")


def _alpha_of(page: Any) -> int:
    """How many of a page's last samples are declared as alpha."""
    return sum(_name(kind) in ("ASSOCALPHA", "UNASSALPHA") for kind in page.extrasamples)


def _page(page: Any, rules: Rules, as_labels: bool) -> Any:
    """One page that is one image, in the colours that it declares."""
    if page.axes not in ("YX", "YXS", "SYX"):
        raise ImageError("axes", f"the TIFF has axes {page.axes}, allowed: one image of Y and X")
    pixels = page.asarray()
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    alpha = _alpha_of(page)
    if alpha and not rules.channels:
        pixels = pixels[..., :-alpha]
    is_palette = _name(page.photometric) == "PALETTE"
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * (1 if as_labels or is_palette else 255)
    return pixels if as_labels else _tiff_colors(page, pixels)


def _tiff_colors(page: Any, pixels: Any) -> Any:
    """Gray or RGB, with or without alpha, from the colours that the TIFF declares."""
    bits = page.bitspersample
    match _name(page.photometric):
        case "MINISBLACK" | "RGB" | "0":
            pass
        case "MINISWHITE" if pixels.dtype.kind == "u":
            pixels = (2**bits - 1 if bits > 1 else 255) - pixels
        case "PALETTE":
            return (np.moveaxis(page.colormap, 0, -1)[pixels] >> 8).astype(np.uint8)
        case "YCBCR" if _name(page.compression) == "JPEG":
            pass  # the JPEG decoder has already made RGB of it
        case "SEPARATED" if pixels.dtype == np.uint8 and pixels.shape[2] == 4:
            return np.asarray(Image.fromarray(pixels, "CMYK").convert("RGB"))
        case other:
            raise ImageError("mode", f"TIFF colours {other} at {bits} bits are not supported")
    if bits in (2, 4):
        pixels = pixels * (85 if bits == 2 else 17)  # stretched to 8 bits, as PNG gray is
    return pixels


def _name(tag: Any) -> str:
    """Name of a TIFF tag's value; tifffile leaves a number where the tag is absent or unknown."""
    return str(getattr(tag, "name", tag))
