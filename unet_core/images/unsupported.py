"""Kinds of files that are not read, told by their names or contents: what they are, what to do.

A picture of a kind that is not read is a failed row, never a gap; so is what merely has the name of
an image.
"""

from unet_core.errors import ErrorCode, ImageError

HEAD_BYTES = 512
"""Bytes at the beginning of a file that tell its kind."""
KINDS = {
    "convert it to a tiled TIFF, e.g. with `vips tiffsave` or QuPath": {
        ".ndpi": "a Hamamatsu NDPI slide",
        ".vms .vmu": "a Hamamatsu slide",
        ".mrxs": "a MIRAX slide",
        ".scn": "a Leica SCN slide",
        ".bif": "a Ventana BIF slide",
    },
    "convert it to OME-TIFF, e.g. with Bio-Formats' `bfconvert`": {
        ".czi .lsm": "a Zeiss microscope image",
        ".nd2": "a Nikon ND2 image",
        ".lif": "a Leica LIF image",
        ".oib .oif .vsi": "an Olympus microscope image",
        ".ims": "an Imaris image",
        ".stk": "a MetaMorph stack",
        ".dm3 .dm4": "a Gatan microscope image",
        ".mrc": "an MRC volume",
    },
    "write its frames as 16-bit TIFF or PNG, e.g. with pydicom": {".dcm .dicom": "a DICOM image"},
    "write its slices as TIFF, e.g. with SimpleITK": {
        ".nii .nii.gz": "a NIfTI volume",
        ".nrrd .nhdr": "an NRRD volume",
        ".mha .mhd": "a MetaImage volume",
    },
    "develop it to a 16-bit TIFF, e.g. with `darktable-cli` or rawpy": {
        ".dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef": "a camera's raw image"
    },
    "convert it to PNG, e.g. with `heif-convert`": {".heic .heif .hif": "a HEIF image"},
    "write its arrays as TIFF, e.g. with h5py and tifffile": {".h5 .hdf5": "an HDF5 file"},
    "convert it to GeoTIFF with `gdal_translate`, where GDAL has its driver": {
        ".ecw": "an ECW image",
        ".sid": "a MrSID image",
    },
    "convert it to a float TIFF, e.g. with `oiiotool`": {".exr": "an OpenEXR image"},
    "export it as a flat PNG or TIFF": {".psd .psb .xcf": "a layered drawing"},
    "convert it to PNG, e.g. with ImageMagick": {".tga": "a Targa image", ".pam": "a PAM image"},
    "convert it to PNG or TIFF, e.g. with `JxrDecApp`": {".jxr .wdp .hdp": "a JPEG XR image"},
}
"""Endings and names of kinds, by the advice for them."""
BY_ENDING = {
    ending: (what, advice)
    for advice, kinds in KINDS.items()
    for endings, what in kinds.items()
    for ending in endings.split()
}
ENDINGS = tuple(BY_ENDING)
OF_TIFF = (".ndpi", ".scn", ".bif", ".lsm", ".stk", ".dng", ".cr2", ".nef", ".arw", ".pef")
"""Their content is TIFF, but the first page is not the image."""
STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"\0\0\0\x0cj", b"\0\0\0\x0cJ")
"""First bytes of images that are decoded, whatever their name is."""

AGAIN = "download it again"  # what was saved is an answer of a server
CONTENTS: tuple[tuple[int, bytes, ErrorCode, str, str], ...] = (
    (0, b"version https://git-lfs", "decode", "a Git LFS pointer", "fetch it with `git lfs pull`"),
    (0, b"<!doctype html", "decode", "an HTML page", AGAIN),
    (0, b"<html", "decode", "an HTML page", AGAIN),
    (0, b"<error>", "decode", "the error message of an object store", AGAIN),
    (0, b"<svg", "unsupported", "an SVG drawing", "draw it as PNG"),
    (0, b"<", "decode", "an XML document", AGAIN),
    (0, b"\x1f\x8b", "decode", "data packed by gzip", "unpack it"),
    (0, b"pk\3\4", "decode", "a ZIP archive", "unpack it"),
    (0, b"%pdf", "unsupported", "a PDF document", "draw its pages as PNG"),
    (0, b"\0\5\x16\7", "decode", "an AppleDouble file of macOS", "leave out files named `._*`"),
    (0, b"8bps", "unsupported", *BY_ENDING[".psd"]),
    (0, b"\x89hdf", "unsupported", *BY_ENDING[".h5"]),
    (0, b"v/1\1", "unsupported", *BY_ENDING[".exr"]),
    (128, b"dicm", "unsupported", *BY_ENDING[".dcm"]),
    (4, b"ftyphei", "unsupported", *BY_ENDING[".heic"]),
    (4, b"ftyphev", "unsupported", *BY_ENDING[".heic"]),
    (4, b"ftypmif1", "unsupported", *BY_ENDING[".heic"]),
    (4, b"ftypcrx", "unsupported", *BY_ENDING[".cr3"]),
)
"""Position, bytes in lower case, code, what it is, what to do; the first that fits counts."""


def has_kind(name: str) -> bool:
    """Tell whether a file's extension is one of a kind that is not read."""
    return name.lower().endswith(ENDINGS)


def by_name(name: str, head: bytes) -> ImageError | None:
    """Why a file of this name is not read; None if it may be, or begins otherwise."""
    lower = name.lower()
    is_tiff = head.startswith((b"II", b"MM")) and not lower.endswith(OF_TIFF)
    if not has_kind(name) or not head or is_tiff or head.startswith(STARTS):
        return None
    return _refusal("unsupported", *next(BY_ENDING[e] for e in ENDINGS if lower.endswith(e)))


def by_content(data: bytes) -> ImageError | None:
    """Why a file with this content is not read; None if it is of no known kind."""
    head = data[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lower()
    if b"avif" in head[8:64]:  # one of the brands in its first box
        return None
    text = head.lstrip()
    if text.startswith(b"<?xml"):
        text = text.partition(b">")[2].lstrip()
    for at, magic, code, what, advice in CONTENTS:
        if (head if at else text).startswith(magic, at):
            return _refusal(code, what, advice)
    return None


def _refusal(code: ErrorCode, what: str, advice: str) -> ImageError:
    instead = "which is not read" if code == "unsupported" else "not an image"
    return ImageError(code, f"this is {what}, {instead}; {advice}")
