import gzip
import io
import zipfile

import numpy as np
import pytest

from tests.support.data import read_all, reading, tiff, write_tar
from tests.support.rasters import labels_of, pixels_of
from unet_core.errors import ImageError
from unet_core.images import unsupported
from unet_core.images.codec import EXTENSIONS, is_image
from unet_core.synthetic import png

GRAY = np.zeros((8, 9), np.uint8)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DENIED = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'
DICOM = bytes(128) + b"DICM" + bytes(99)


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", png(GRAY))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (LFS, "decode", r"Git LFS pointer.*`git lfs pull`"),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><html>", "decode", "HTML page"),
        (b"<HTML><body>", "decode", "HTML page"),
        (DENIED, "decode", "error message of an object store"),
        (b'<?xml version="1.0"?>\n<svg width="9">', "unsupported", "SVG drawing"),
        (b'<?xml version="1.0"?><a/>', "decode", "XML document"),
        (gzip.compress(png(GRAY)), "decode", "gzip.*unpack"),
        (zipped(), "decode", "ZIP archive.*unpack"),
        (b"%PDF-1.7", "unsupported", "PDF"),
        (b"\0\5\x16\7\0\2\0\0", "decode", "AppleDouble"),
        (DICOM, "unsupported", "DICOM.*pydicom"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported", "HEIF"),
        (b"\x89HDF\r\n\x1a\n", "unsupported", "HDF5"),
        (b"8BPS\0\1", "unsupported", "layered drawing"),
        (b"nonsense", "decode", "not a TIFF, PNG, .*, JPEG 2000, JPEG XL or PNM"),
    ],
)
def test_what_only_has_the_name_of_an_image_is_told_as_what_it_is(data, code, words):
    for decode in (pixels_of, lambda *arguments: labels_of(*arguments, 2)):
        with pytest.raises(ImageError, match=words) as caught:
            decode(data, reading(99))
        assert caught.value.code == code


def outcome(sample):
    try:
        if sample.failure is not None:
            raise sample.failure
        return len(sample.read())
    except ImageError as error:
        return error.code


def test_every_kind_is_told_with_a_way_out_and_none_is_decoded_too():
    for ending in unsupported.ENDINGS:
        assert is_image(f"a{ending.upper()}")
        assert not f"a{ending}".endswith(EXTENSIONS)
        refusal = unsupported.by_name(f"x/a{ending}", bytes(9))
        assert refusal.code == "unsupported"
        assert ", which is not read; " in str(refusal)


NAMES = {"a.ndpi": bytes(9999), "b.DCM": DICOM, "c.nii.gz": gzip.compress(b"1"), "d.heic": b"",
         "e.heic": png(GRAY), "f.psd": tiff(GRAY), "g.nef": tiff(GRAY),
         "h.png": png(GRAY)}  # fmt: skip
EXPECTED = ["unsupported"] * 3 + [0, len(png(GRAY)), len(tiff(GRAY)), "unsupported", len(png(GRAY))]


def test_kinds_that_are_not_read_are_failed_rows_in_every_container(tmp_path):
    (tmp_path / "in").mkdir()
    for name, data in NAMES.items():
        (tmp_path / "in" / name).write_bytes(data)
    write_tar(tmp_path / "t.tar", NAMES)
    (tmp_path / "in" / "list.csv").write_text("\n".join(["uri", *NAMES]))
    for keys in ({"uri": tmp_path / "in"}, {"uri": tmp_path / "t.tar"},
                 {"uri": tmp_path / "in" / "list.csv", "format": "list"}):  # fmt: skip
        _, (samples,) = read_all(**keys)
        assert [outcome(sample) for sample in samples] == EXPECTED


def test_a_folder_of_nothing_else_and_such_files_beside_tars_are_understood(tmp_path):
    (tmp_path / "a.dcm").write_bytes(DICOM)
    shards, _ = read_all(uri=tmp_path)
    assert shards[0].count == 1
    write_tar(tmp_path / "t.tar", {"b.png": png(GRAY)})
    shards, _ = read_all(uri=tmp_path)
    assert [shard.uri for shard in shards] == ["t.tar"]


def test_other_files_of_a_key_in_a_tar_are_not_its_image(tmp_path):
    write_tar(tmp_path / "t.tar", {"a.exr": b"v/1\1", "a.png": png(GRAY), "b.dcm": DICOM,
                                   "b.h5": b"\x89HDF"})  # fmt: skip
    _, (samples,) = read_all(uri=tmp_path)
    assert [(s.key, outcome(s)) for s in samples] == [("a", len(png(GRAY))), ("b", "unsupported")]
