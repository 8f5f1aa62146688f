"""Tars made to do harm: told in rows, and read in bounded memory."""

import gzip
import struct
import tarfile

import pytest

from tests.support import doors
from tests.support.confined import MIB, confined
from tests.support.hostile import packed


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
