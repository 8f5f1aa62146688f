"""Pages of TIFFs: which are images, which are masks, overviews or pictures beside a slide.

The answer is the same for files that are decoded whole and for those that are read by window. Axes
by tifffile's letters: Y rows, X columns, S samples, C channels; all others are pages.
"""

import math
import re
from typing import Any, NamedTuple

import numpy as np

from unet_core.config.sections import InputConfig
from unet_core.errors import ImageError

MAX_PLANES = 2**20
"""Largest number of planes that metadata may claim: their list alone takes memory."""
MAX_PAGES = 2**15
"""Largest number of pages; a page takes about 16 kB as soon as it is listed."""
NUMBERS = (
    "imagewidth", "imagelength", "imagedepth", "tilewidth", "tilelength", "tiledepth",
    "rowsperstrip", "samplesperpixel", "subfiletype",
)  # fmt: skip
"""Properties of a page that are multiplied or hold bits, and that must be integers."""
REDUCED, MASK = 1, 4
"""Bits of NewSubfileType."""
SLIDES = ("svs", "scn", "qpi", "ndpi", "bif", "avs", "philips")
"""Formats of slide scanners that tifffile knows; their first series is the slide."""
EXTRAS = {"thumbnail", "label", "macro", "map", "overview"}
"""Names of series that slide scanners store beside the slide."""


class TiffImages(NamedTuple):
    """The images of a TIFF."""

    pages: list[Any]
    """Pages of full size, which are images, or planes of them."""
    series: list[Any]
    """The same as series with axes."""
    is_stack: bool
    """True if pages are planes of something whose axes are declared, or lie behind one page."""
    masks: dict[tuple[int, int], list[Any]]
    """Pages that say which pixels of images of a size are valid, by height and width."""

    def mask_of(self, page: Any, number: int = 0) -> Any | None:
        """Find the mask of an image; the first image takes the first mask of its size."""
        masks = self.masks.get(_size(page))
        return masks[min(number, len(masks) - 1)] if masks else None


def images_of(tiff: Any, config: InputConfig) -> TiffImages:
    """Find the images of an opened file, and whether they are a stack.

    Masks (bit 4 of NewSubfileType, or a photometric interpretation of that name) and overviews
    (bit 1, SubIFDs, levels of a pyramid) are images only where there is nothing else. Of a slide,
    the baseline is the only image; thumbnail, label and macro are none.

    Raises ImageError for lying headers.
    """
    tiff.pages._offsets = Chain(tiff.pages._offsets)
    if not (chain := list(tiff.pages)):
        raise ImageError("decode", "the TIFF has no page that can be read")
    for page in chain:
        require_numbers(page)
    series = _series_of(tiff)
    if is_slide(tiff):
        full = _scans(tiff.scn_metadata, series) if tiff.is_scn else series[:1]
        pages = [page for one in full for page in one if page is not None] or chain[:1]
    else:
        full = [one for one in series if is_full_size(one.keyframe)]
        full = full[:1] + [one for one in full[1:] if not _is_extra(one)]
        others = [level for one in series for level in one.levels[1:]]
        others += [one for one in series if _is_extra(one) and one not in full]
        beside = {page.offset for one in others for page in one if page is not None}
        pages = [p for p in chain if is_full_size(p) and p.offset not in beside] or chain[:1]
    masks: dict[tuple[int, int], list[Any]] = {_size(page): [] for page in pages}
    for page in chain:
        if _is_mask(page) and page is not pages[0] and _size(page) in masks:
            masks[_size(page)].append(page)
    return TiffImages(pages, full, _is_stack(tiff, len(pages), full, config), masks)


class Chain(list[int]):
    """Offsets of the pages of a file; refuses a page chain that runs in a circle."""

    def __init__(self, offsets: list[int]) -> None:
        super().__init__(offsets)
        self._seen = set(offsets)

    def append(self, offset: int) -> None:
        """Raises ImageError for a page that was there before, and for too many."""
        if offset in self._seen:
            raise ImageError("decode", f"its pages go in a circle at byte {offset}")
        if len(self) >= MAX_PAGES:
            raise ImageError("too_large", f"more than {MAX_PAGES} pages")
        self._seen.add(offset)
        super().append(offset)


def require_numbers(page: Any) -> None:
    """Raise ImageError for sizes that are texts or lists: times a number, they fill memory."""
    for name in NUMBERS:
        value = getattr(page.keyframe, name)
        if not isinstance(value, int):
            raise ImageError("decode", f"{name} is {str(value)[:50]}, not a number")
    for kind in {*map(type, page.dataoffsets), *map(type, page.databytecounts)}:
        if not issubclass(kind, int | np.integer):
            raise ImageError("decode", "where its strips or tiles lie is no number")


def is_slide(tiff: Any) -> bool:
    """Tell whether a file is of a slide scanner."""
    return any(getattr(tiff, f"is_{kind}") for kind in SLIDES)


def is_full_size(page: Any) -> bool:
    """Tell whether a page is neither a mask nor an overview."""
    page = page.keyframe
    return not (page.is_subifd or page.subfiletype & REDUCED or _is_mask(page))


def _is_mask(page: Any) -> bool:
    return bool(page.subfiletype & MASK) or name_of(page.photometric) == "MASK"


def _is_extra(series: Any) -> bool:
    return (series.name or "").lower().removesuffix(" image") in EXTRAS


def _size(page: Any) -> tuple[int, int]:
    return page.keyframe.imagelength, page.keyframe.imagewidth


def _scans(scn_xml: str, series: list[Any]) -> list[Any]:
    """List the scanned regions of a Leica slide: what is as fine as the finest, but no overview."""
    views, pixels = (
        [int(size) for size in re.findall(rf"<{name}\b[^>]*?\bsizeX=\"(\d+)", scn_xml)]
        for name in ("view", "pixels")
    )
    if not len(views) == len(pixels) == len(series):
        return series[:1]
    scales = [view / max(1, size) for view, size in zip(views, pixels, strict=True)]
    return [one for one, scale in zip(series, scales, strict=True) if scale < 2 * min(scales)]


def _series_of(tiff: Any) -> list[Any]:
    """List the series of a file; raises ImageError for metadata that claims more planes than memory
    has room to list.
    """
    ome_xml = (tiff.is_ome and tiff.ome_metadata) or ""
    sizes = [
        math.prod(int(size) for size in re.findall(r"Size[CZT]\s*=\s*[\"'](\d+)", pixels))
        for pixels in re.findall(r"<(?:\w+:)?Pixels\b[^>]*>", ome_xml)
    ]
    sizes += map(int, re.findall(r"(?:PlaneCount|NumPlanes)\s*=\s*[\"'](\d+)", ome_xml))
    most = max(sizes, default=0)
    if tiff.is_scn:  # tifffile lists c · z planes
        numbers = re.findall(r"\b[cz]\s*=\s*[\"'](\d+)", tiff.scn_metadata)
        most = (1 + max(map(int, numbers), default=0)) ** 2
    if most > MAX_PLANES:
        raise ImageError("too_large", f"{most} planes by its metadata, allowed: {MAX_PLANES}")
    return [one for one in tiff.series if len(one)]


def _is_stack(tiff: Any, pages: int, series: list[Any], config: InputConfig) -> bool:
    is_declared = config.axes or tiff.is_ome or tiff.is_imagej
    has_channels = is_slide(tiff) and any("C" in one.axes for one in series)
    if pages > 1 and (is_declared or has_channels) and series:
        return True
    beside = sum(not is_full_size(page) for one in series for page in one if page is not None)
    return sum(count_planes(s.shape, s.axes, "YXS") for s in series) > pages + beside


def count_planes(shape: tuple[int, ...], axes: str, axes_of_a_plane: str) -> int:
    """Count the planes of an image with these axes."""
    return math.prod(n for n, axis in zip(shape, axes, strict=True) if axis not in axes_of_a_plane)


def require_allowed(pages: int, config: InputConfig) -> None:
    """Raise ImageError for several pages, unless each may be an image."""
    if pages > 1 and config.pages == "refuse":
        raise ImageError(
            "frames",
            f"the TIFF holds {pages} pages; input.pages = 'expand' makes each an image, "
            "input.axes = 'CYX' makes them channels",
        )


def stack_axes(series: Any, number_of_series: int, config: InputConfig) -> str:
    """Return the axes of a stack; raises ImageError for impossible ones, odd colors and gaps."""
    axes, shape = config.axes or series.axes, series.shape
    is_wrong = len(axes) != len(shape) or "Y" not in axes or "X" not in axes
    if is_wrong or (config.axes and number_of_series > 1):
        found = series.axes if number_of_series == 1 else f"{number_of_series} sizes of pages"
        raise ImageError("axes", f"the TIFF has shape {shape} and {found}, which is not {axes}")
    page = series.keyframe
    if not is_plain(page) or page.bitspersample in (2, 4):  # colors that only single pages have
        raise ImageError(
            "mode",
            f"a stack of {name_of(page.photometric)} at {page.bitspersample} bits is not supported",
        )
    if any(plane is None for plane in series):
        raise ImageError("frames", "planes of the stack are missing; they lie in other files")
    return str(axes)


def is_plain(page: Any) -> bool:
    """Tell whether each sample of a page is a channel of its own, as it is."""
    return name_of(page.photometric) in ("MINISBLACK", "RGB", "0")


def name_of(tag: Any) -> str:
    """Name the value of a TIFF tag; tifffile leaves a number where it is absent or unknown."""
    return str(getattr(tag, "name", tag))
