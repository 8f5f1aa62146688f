"""Files and configs made to do harm: every one is refused, told in a row, or read rightly."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zlib

import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.predict import predict
from tests.support import doors
from tests.support.confined import MIB, confined
from tests.support.data import rewritten
from tests.support.s3 import BUCKET
from unet_core.config import PredictConfig, build
from unet_core.errors import ConfigError
from unet_core.runs.results import open_run
from unet_core.runs.verify import verify
from unet_core.synthetic import nuclei, png

KIB = 1024


def squeezed(size: int, window: int = 15) -> bytes:
    """So many zeros, packed."""
    packer = zlib.compressobj(9, zlib.DEFLATED, window)
    packed = [packer.compress(bytes(MIB)) for _ in range(size // MIB)]
    return b"".join([*packed, packer.flush()])


BOMB = squeezed(256 * MIB)


# --- images ---------------------------------------------------------------------------------


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width, height, *extra, color=0, body=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
    end = chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + end


def bmp_of(width, height):
    fields = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + fields


def gif_of(width, height, frames):
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0)
    return b"GIF89a" + screen + b"\0\0\0\xff\xff\xff" + frame * frames + b";"


def webp_of(width, height):
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    pixels = b"VP8L" + struct.pack("<I", 10) + b"\x2f\xff\xff\xff\x0f" + bytes(5)
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + pixels
    return b"RIFF" + struct.pack("<I", len(body)) + body


def pages_of(*pages, start=8):
    """A TIFF of directories: tag → value, all of them 32 bits, with the next one's offset last."""
    parts, at = [b"II*\0" + struct.pack("<I", start)], 8
    for number, tags in enumerate(pages):
        following = tags.get("next")
        entries = sorted((k, v) for k, v in tags.items() if k != "next")
        at += 6 + 12 * len(entries)
        if following is None:
            following = at if number + 1 < len(pages) else 0
        fields = [struct.pack("<HHII", k, *(v if isinstance(v, tuple) else (4, 1, v)))
                  for k, v in entries]  # fmt: skip
        parts.append(struct.pack("<H", len(entries)) + b"".join(fields))
        parts.append(struct.pack("<I", following))
    return b"".join(parts)


def tiff_of(width=8, height=8, data=bytes(64), **tags):
    """A gray strip, its pixels behind the header; tags by number (``t259``), None to leave out."""
    own = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 278: height, 279: len(data)}
    own |= {int(name[1:]): value for name, value in tags.items() if name != "next"}
    own = {key: value for key, value in own.items() if value is not None}
    start = 8 + 6 + 12 * (len(own) + (273 not in own))
    own.setdefault(273, start)
    if "next" in tags:
        own["next"] = tags["next"]
    return pages_of(own) + data


TILED = {"t322": 16, "t323": 16, "t324": 8, "t325": 64}
ONE = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 4, 277: 1, 278: 1, 279: 1}
LIE = np.zeros((9000, 9000), np.uint8)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(data, expected, id=name)
        for name, expected, data in [
            ("png pixels", "too_large", png_of(2**31 - 1, 2**31 - 1)),
            ("bmp pixels", "too_large", bmp_of(2**31 - 1, 2**31 - 1)),
            ("bmp below zero", "too_large", bmp_of(-5, -(2**31))),
            ("gif pixels", "too_large", gif_of(65535, 65535, 1)),
            ("webp pixels", "decode", webp_of(2**24, 2**24)),
            ("gif frames", "frames", gif_of(1, 1, 20_000)),
            ("apng frames", "frames",
             png_of(1, 1, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)))),
            ("png zTXt", "decode", png_of(2, 2, chunk(b"zTXt", b"k\0\0" + BOMB))),
            ("png iTXt", "decode", png_of(2, 2, chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB))),
            ("png iCCP", "decode", png_of(2, 2, chunk(b"iCCP", b"k\0\0" + BOMB), color=2)),
            ("png IDAT", [(2, 2, 1)], png_of(2, 2, body=BOMB)),
            ("png rgb IDAT", [(2, 2, 3)], png_of(2, 2, color=2, body=BOMB)),
            ("png without pixels", "decode", png_of(999, 999, color=2, body=zlib.compress(b""))),
            ("tiff pixels", "too_large", tiff_of(2**32 - 1, 2**32 - 1)),
            ("tiff deflate", "decode", tiff_of(64, 64, BOMB, t259=8)),
            ("tiff lzw", [(64, 64, 1)],
             tiff_of(64, 64, imagecodecs.lzw_encode(bytes(32 * MIB)), t259=5)),
            ("tiff zstd", "decode",
             tiff_of(64, 64, imagecodecs.zstd_encode(bytes(256 * MIB)), t259=50000)),
            ("tiff jpeg2000", "decode",
             tiff_of(64, 64, imagecodecs.jpeg2k_encode(LIE, level=0, codecformat="j2k"),
                     t259=34712)),
            ("tiff png", "decode", tiff_of(64, 64, imagecodecs.png_encode(LIE), t259=34933)),
            ("tiff 0 bits", "mode", tiff_of(t258=0)),
            ("tiff 65535 bits", "mode", tiff_of(t258=65535)),
            ("tiff 65535 samples", "decode", tiff_of(t277=65535)),
            ("tiff countless strips", "decode", tiff_of(t273=(4, 10**9, 8))),
            ("tiff long text", [(8, 8, 1)], tiff_of(t270=(2, 2**32 - 1, 8))),
            ("tiff countless tiles", [(8, 8, 1)], tiff_of(**TILED | {"t324": (4, 10**9, 8)})),
            ("tiff tiles of nothing", "decode", tiff_of(**TILED | {"t322": 0, "t323": 0})),
            ("tiff huge tiles", "too_large", tiff_of(t259=8, **TILED | {"t322": 2**16,
                                                                       "t323": 2**16})),
            ("tiff width is a text", "decode", tiff_of(t256=(2, 4, 0x41414141), t257=2**31)),
            ("tiff depth", "too_large", tiff_of(t32997=2**31)),
            ("tiff page is its own next", "decode", tiff_of(next=8)),
            ("tiff pages in a circle", "decode", pages_of(*[ONE] * 150, {**ONE, "next": 8})),
            ("tiff directory without entries", "decode", b"II*\0" + bytes([8, 0, 0, 0]) +
             struct.pack("<HI", 0, 8)),
            ("tiff many pages", "too_large", pages_of(*[ONE] * 1500)),
            ("tiff many entries", "decode", pages_of(ONE)[:8] + b"\xff\xff" + bytes(99)),
            ("bigtiff billion entries", "decode",
             b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 10**9) + bytes(999)),
        ]
    ],
)  # fmt: skip
def test_an_image_that_lies_is_refused_with_a_code_or_decoded_in_bounded_memory(data, expected):
    found = confined(doors.picture_or_code, data, memory=256 * MIB)
    assert (found.error, found.value) == ("", expected), found.text
    assert found.memory < 128 * MIB


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_an_image_cut_anywhere_is_refused_or_told(kind):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(nuclei(40, 40, np.random.default_rng(0))[0]).save(buffer, format=kind)
    cuts = [buffer.getvalue()[:stop] for stop in range(0, buffer.tell(), 1 + buffer.tell() // 150)]
    found = confined(doors.codes, cuts, memory=256 * MIB)
    assert found.error == "", found.text
    assert set(found.value) <= {"empty", "decode"}


# --- tars -----------------------------------------------------------------------------------


def header(name="x.png", size=0, kind=b"0", size_field=b"", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    fields = {"124": size_field} | fields
    for at, value in fields.items():
        block[int(at.strip("_")) : int(at.strip("_")) + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[-512:])
    return bytes(block)


def pax(kind=b"x", **records):
    body = b""
    for key, value in records.items():
        record = b" " + key.replace("_", ".").encode() + b"=" + value + b"\n"
        size = len(record)
        while len(str(size)) + len(record) != size:
            size = len(str(size)) + len(record)
        body += str(size).encode() + record
    return header("pax", len(body), kind) + body + bytes(-len(body) % 512)


def sparse(real_size, is_extended=0):
    fields = {"_386": b"00000000000\0", "_398": b"00000001000\0", "_482": bytes([is_extended]),
              "_483": real_size}  # fmt: skip
    return header(size=512, kind=b"S", **fields)


def packed(*parts):
    """Bytes, and numbers of zeros, in gzip."""
    packer, out = zlib.compressobj(1, zlib.DEFLATED, 31), []
    for part in parts:
        pieces = [part] if isinstance(part, bytes) else [bytes(MIB)] * (part // MIB)
        out += [packer.compress(piece) for piece in pieces]
    return b"".join([*out, packer.flush()])


END = bytes(1024)
BAD = [("t.tar", "tar")]
MAP = struct.pack("504s8s", b"00000000000\0" * 42, b"\1")
GLOBALS = b"".join(pax(b"g", **{f"k{n}": b"v" * 9999}) + header("x.txt") for n in range(200))
TEN = [(f"t.tar/{n}", "0") for n in range(20)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(data, expected, id=name)
        for name, expected, data in [
            *[(f"link or device {kind}", [("t.tar/x", "not_a_file")], header(kind=kind) + END)
              for kind in (b"1", b"2", b"3", b"4", b"6")],
            ("names that leave", [("t.tar/../../x", "0"), ("t.tar//etc/x", "0")],
             header("../../x.png") + header("/etc/x.png") + END),
            ("one name twice", [("t.tar/x", "0")] * 2, header() * 2 + END),
            ("size below zero", [("t.tar/x", "0"), *BAD],
             header(size_field=b"\xff" * 10 + b"\0\0") + header("y.png") + END),
            ("size no number", BAD, header(size_field=b"99999999999\0") + END),
            ("size 2^62", [("t.tar/x", "too_large"), *BAD],
             header(size_field=b"\x80\0\0\0" + (2**62).to_bytes(8, "big")) + END),
            ("pax size", [("t.tar/x", "too_large"), *BAD],
             pax(size=b"99999999999999999999") + header() + END),
            ("pax size below zero", [("t.tar/x", "0"), *BAD], pax(size=b"-1024") + header() + END),
            ("sparse of 8 GiB", [("t.tar/x", "too_large")],
             sparse(b"77777777777\0") + bytes(512) + END),
            ("pax sparse of 4 TiB", [("t.tar/x", "too_large")],
             pax(GNU_sparse_map=b"0,1", GNU_sparse_size=b"%d" % 2**42) + header(size=512) +
             bytes(512) + END),
            ("sparse of countless maps", BAD, packed(sparse(b"00000001000\0", 1), MAP * 9999)),
            ("no end", [("t.tar/x", "0"), *BAD], header()),
            ("pax of 1 GiB", BAD, packed(header("p", 2**30, b"x"), 64 * MIB)),
            ("long name of 1 GiB", BAD, packed(header("p", 2**30, b"L"), 64 * MIB)),
            ("headers within headers", BAD, packed(pax(comment=b"c") * 3000, header(), END)),
            ("headers for all", BAD, packed(GLOBALS, END)),
            ("packed zeros", [("t.tar/x", "0")], packed(header(), END, 48 * MIB)),
            ("packed and not an image", [("t.tar/x", "0")],
             packed(header("x.txt", 512 * MIB), 512 * MIB, header(), END)),
            ("one name too often", [("t.tar/x", str(48 * MIB)), *[("t.tar/x", "too_large")] * 7],
             packed(*[header(size=48 * MIB), 48 * MIB] * 8, END)),
            ("packed twice", BAD, gzip.compress(gzip.compress(header() + END))),
            ("20,000 empty members", TEN,
             packed(b"".join(header(f"{n}.png") for n in range(20_000)), END)),
            ("30,000 other members", [], packed(header("x.txt") * 30_000, END)),
        ]
    ],
)  # fmt: skip
def test_a_tar_that_lies_is_told_in_rows_and_read_in_bounded_memory(data, expected):
    found = confined(doors.few_bytes, data, memory=512 * MIB, seconds=60)
    assert (found.error, found.value) == ("", expected), found.text
    assert found.memory < 200 * MIB


# --- Parquet --------------------------------------------------------------------------------


def parquet(column, name="image", ids=None, **options):
    buffer = io.BytesIO()
    table = {name: column} | ({"id": ids} if ids is not None else {})
    pq.write_table(pa.table(table), buffer, **options)
    return buffer.getvalue()


def structs(**fields):
    return pa.array([fields])


NOT_UTF8 = pa.StringArray.from_buffers(
    2, pa.py_buffer(struct.pack("<3i", 0, 1, 2)), pa.py_buffer(b"\xff\xfe")
)
REPEATED = pa.DictionaryArray.from_arrays(pa.array([0] * 40, pa.int32()), [bytes(24 * MIB)])
PLAIN = parquet([b"a"] * 99, use_dictionary=False)
EMPTY = [("t.parquet#0", "empty"), ("t.parquet#1", "empty")]


@pytest.mark.parametrize(
    ("data", "keys", "expected"),
    [
        pytest.param(data, keys, expected, id=name)
        for name, keys, expected, data in [
            ("one image for every row", {}, [(f"t.parquet#{n}", str(24 * MIB)) for n in range(20)],
             parquet(REPEATED, dictionary_pagesize_limit=2**30, store_schema=False)),
            ("no row groups", {}, "StoreError", parquet(pa.array([], pa.binary()))),
            ("no bytes", {}, EMPTY, parquet(pa.array([None, {"bytes": None}],
                                                     pa.struct({"bytes": pa.binary()})))),
            ("a list", {}, "ConfigError", parquet([[b"a"], []])),
            ("path is a number", {}, [("t.parquet#0", "1")], parquet(structs(bytes=b"a", path=7))),
            ("path is a struct", {}, [("t.parquet#0", "1")],
             parquet(structs(bytes=b"a", path={"x": 1}))),
            ("bytes in bytes", {}, [("t.parquet#0", "1")], parquet(structs(bytes={"bytes": b"a"}))),
            ("path is no UTF-8", {}, [("t.parquet#0", "1"), ("t.parquet#1", "1")],
             parquet(pa.StructArray.from_arrays([pa.array([b"a", b"b"]), NOT_UTF8],
                                                ["bytes", "path"]))),
            ("id is no UTF-8", {"id_column": "id"}, [("\\xff", "1"), ("\\xfe", "1")],
             parquet([b"a", b"b"], ids=NOT_UTF8)),
            ("ids repeated, null and huge", {"id_column": "id"},
             [("x", "1"), ("x", "1"), ("t.parquet#2", "1"), ("y" * 10**6, "1")],
             parquet([b"a"] * 4, ids=["x", "x", None, "y" * 10**6])),
            ("ids are lists", {"id_column": "id"}, "ConfigError", parquet([b"a"], ids=[["x"]])),
            ("ids are times", {"id_column": "id"}, "ConfigError",
             parquet([b"a"], ids=pa.array([2**62], pa.timestamp("ns")))),
            ("footer of 2 GiB", {}, "ParquetDamagedError", PLAIN[:-8] + b"\xff\xff\xff\x7fPAR1"),
            ("half", {}, "ParquetDamagedError", PLAIN[: len(PLAIN) // 2]),
        ]
    ],
)  # fmt: skip
def test_a_parquet_file_that_lies_is_refused_or_told_in_rows(data, keys, expected):
    found = confined(doors.rows, "t.parquet", data, keys, memory=1024 * MIB)
    assert (found.error or found.value) == expected, found.text
    assert found.memory < 640 * MIB


# --- checkpoints ----------------------------------------------------------------------------


def metadata(**texts):
    def change(found):
        found["__metadata__"] |= {
            key: text if isinstance(text, str) else json.dumps(text) for key, text in texts.items()
        }

    return change


def edited(key, **values):
    def change(found):
        inner = json.loads(found["__metadata__"][key])
        found["__metadata__"][key] = json.dumps(inner | values)

    return change


def offsets(start, stop):
    def change(found):
        found["head.conv.bias"]["data_offsets"] = [start, stop]

    return change


def dtype(name, tensor="head.conv.bias"):
    return lambda found: found[tensor].update({"dtype": name})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, id=name)
        for name, change in [
            ("offsets out of the file", offsets(0, 2**50)),
            ("offsets that overlap", offsets(0, 4)),
            ("offsets backwards", offsets(4, 0)),
            ("numbers for floats", dtype("I32")),
            ("no such type", dtype("F3")),
            ("another shape", lambda found: found["head.conv.bias"].update(shape=[2**40, 2**40])),
            ("metadata is a list", lambda found: found.update(__metadata__=["format"])),
            ("metadata is a number", lambda found: found["__metadata__"].update(format=3)),
            ("deep metadata", metadata(model="[" * 100_000)),
            ("long number", metadata(tiling="1" * 100_000)),
            ("a network of petabytes", edited("model", width=2**24)),
            ("a network without end", edited("model", depth=10**9)),
            ("half a pool", edited("model", depth=4.5)),
            ("depth is true", edited("model", depth=True)),
            ("stride 0", edited("tiling", stride=0)),
            ("halo below zero", edited("tiling", halo=-16)),
            ("an absurd halo", edited("tiling", halo=2**40)),
            ("channels of nothing", edited("tiling", channels=0)),
            ("sides of others", edited("tiling", sides={"smallest": 2**15, "step": 16})),
            ("step 0", edited("tiling", sides={"smallest": 16, "step": 0})),
            ("a million classes", metadata(classes=["x"] * 10**6)),
            ("classes are a text", metadata(classes="ab")),
            ("colours of nothing", metadata(palette=[[0, 0, 0], [256, -1, 0]])),
            ("no factory of the config", metadata(
                model={"factory": "os:system", "arguments": {"command": "touch {marker}"}})),
        ]
    ],
)  # fmt: skip
def test_a_checkpoint_that_lies_is_refused_and_runs_nothing(
    change, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with open(rewritten(tiny_model, tmp_path, change), "rb") as file:
        data = file.read()
    found = confined(doors.network, data, memory=512 * MIB)
    assert found.error == "CheckpointError", found
    assert len(found.text) < 1000
    assert found.memory < 256 * MIB


class Running:
    """A pickle that leaves a mark if it is loaded as one."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_runs_nothing_by_whatever_door_it_comes(tmp_path):
    data = pickle.dumps({"a": Running(tmp_path / "marker")}, protocol=2)
    for door in (doors.tensors, doors.network):
        found = confined(door, data)
        assert found.error == "CheckpointError", found
    assert not (tmp_path / "marker").exists()
    pickle.loads(data)
    assert (tmp_path / "marker").exists()


# --- lists and configs ----------------------------------------------------------------------


def inventory(**keys):
    manifest = {"sourceBucket": "b", "fileSchema": "Bucket, Key, Size"}
    return json.dumps(manifest | {"files": [{"key": "manifest.json"}]} | keys).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param(name, data, id=what)
        for what, name, data in [
            ("a line without an end", "x.csv.gz", squeezed(256 * MIB, 31)),
            ("a row without an end", "x.csv.gz", packed(b"uri\n", b'"\n",' * 10**6)),
            ("damaged gzip", "x.csv.gz", gzip.compress(b"uri\na.png\n")[:-9] + bytes(9)),
            ("no UTF-8", "x.parquet", parquet(NOT_UTF8, "uri")),
            ("inventory without keys", "manifest.json", inventory(fileSchema="Size")),
            ("credentials", "x.csv", b"uri\ns3://KEY:hunter2@b/x.png\n"),
            ("credentials with a slash", "x.csv", b"uri\ns3://KEY:hun/ter2@b/x.png\n"),
            ("chain", "x.csv", b"uri\nsimplecache::s3://b/x.png\n"),
            ("metadata service", "x.csv", b"uri\nhttp://169.254.169.254/x.png\n"),
            ("local", "x.csv", b"uri\nlocal:///etc/x.png\n"),
            ("absolute", "x.csv", b"uri\nfile:///etc/passwd\n"),
        ]
    ],
)
def test_a_list_that_leads_elsewhere_is_refused_and_repeats_no_secret(name, data):
    found = confined(doors.listed, name, data, {}, memory=512 * MIB)
    assert found.error == "ConfigError", found
    assert "hunter2" not in found.text
    assert "ter2" not in found.text
    assert found.memory < 128 * MIB


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("input.uri", "simplecache::s3://b/x", "chained"),
        ("input.uri", "s3://KEY:hunter2@b/x", "holds credentials"),
        ("input.uri", "s3://KEY:hun/ter2@b/x", "holds credentials"),
        ("input.uri", "simplecache::s3://KEY:hunter2@b/x", "holds credentials"),
        ("input.uri", "http://me:hunter2@host/x", "holds credentials"),
        ("input.uri", "s3://hunter2@b/../x", "holds credentials"),
        ("input.uri", "abfs://c:hunter2@account.dfs.core.windows.net/x", "holds credentials"),
        ("input.masks", "s3://KEY:hunter2@b/x", "holds credentials"),
        ("input.allow", ["s3://KEY:hunter2@b/x"], "holds credentials"),
        ("input.allow", ["simplecache::s3://b"], "chained"),
        ("model.checkpoint", "s3://KEY:hunter2@b/x.safetensors", "holds credentials"),
        ("output.uri", "s3://KEY:hunter2@b/x", "holds credentials"),
        ("storage.endpoint_url", "http://KEY:hunter2@minio", "holds credentials"),
        ("output.uri", "{in}/run", "must not contain each other"),
        ("output.uri", "file://{in}/run", "must not contain each other"),
        ("output.uri", "{link}/run", "must not contain each other"),
        ("output.uri", "{above}", "must not contain each other"),
    ],
)
def test_a_config_that_no_job_should_have_is_refused_and_repeats_no_secret(
    key, value, reason, tmp_path
):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    places = {"in": tmp_path / "in", "link": tmp_path / "link", "above": tmp_path}
    table = {"input": {"uri": f"{tmp_path}/in"}, "output": {"uri": f"{tmp_path}/out"}}
    section, _, name = key.partition(".")
    table.setdefault(section, {})[name] = (
        value.format(**places) if isinstance(value, str) else value
    )
    with pytest.raises(ConfigError, match=reason) as caught:
        build(PredictConfig, table, [])
    assert "hunter2" not in str(caught.value)
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "abfs://container@account.dfs.core.windows.net/x",
        "s3://arn:aws:s3:eu-west-1:1:accesspoint/x",
        "s3://b/a@b:c/x",
        "a@b:c/x",
        "file:///a@b:c/x",
    ],
)
def test_uris_that_only_look_as_if_they_held_credentials_are_taken(uri):
    table = {"input": {"uri": uri}, "output": {"uri": "out"}}
    assert build(PredictConfig, table, []).input.uri == uri


# --- names ----------------------------------------------------------------------------------

NAMES = [
    "with space", "'quotes\"", "new\nline", "tab\t", "50%25", "a#b", "a?b=c", "a*b", "a[b]c",
    "{a,b}", "😀", "\u05d0\u05d1\u202e", "back\\slash", "é", "e\u0301", "-rf", "~", "$HOME", "a:b",
    "c" * 250,
]  # fmt: skip
LONG = "/".join(["d" * 200] * 4) + "/" + "n" * 80
IMAGE = png(nuclei(32, 32, np.random.default_rng(0))[0])


def in_a_folder(root, names, _):
    for name in names:
        (root / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "in" / name).write_bytes(IMAGE)
    return {"uri": str(root / "in")}, {}, ""


def in_a_tar(root, names, _):
    with tarfile.open(root / "in.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(IMAGE)
            tar.addfile(info, io.BytesIO(IMAGE))
    return {"uri": str(root / "in.tar")}, {}, "in.tar/"


def in_a_store(root, names, s3):
    client = s3.client()
    names.remove("new\nline.png")  # the suite's store knows no such key
    for name in names:
        client.put_object(Bucket=BUCKET, Key=f"{root.name}/{name}", Body=IMAGE)
    return {"uri": f"s3://{BUCKET}/{root.name}"}, {"endpoint_url": s3.url}, ""


@pytest.mark.parametrize("place", [in_a_folder, in_a_tar, in_a_store])
def test_images_of_any_name_are_segmented_found_and_verified(place, make_config, tmp_path, s3):
    names = [f"{name}.png" for name in (*NAMES, LONG)]
    section, storage, before = place(tmp_path, names, s3)
    config = make_config(input={**section, "masks": ""}, storage=storage)
    predict(config)
    ids = sorted(f"{before}{name.removesuffix('.png') if before else name}" for name in names)
    run = str(tmp_path / "run")
    rows = [row for path in (tmp_path / "run" / "metrics").iterdir()
            for row in pq.read_table(path).to_pylist()]  # fmt: skip
    assert sorted(row["image_id"] for row in rows) == ids
    assert {row["status"] for row in rows} == {"ok"}
    masks = {open_run(run).mask(image_id).tobytes() for image_id in ids}
    assert len(masks) == 1
    assert verify(run, deep=True, storage=config.storage).problems == []
