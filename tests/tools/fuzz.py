"""Fuzzing of everything that reads foreign bytes: ``python -m tests.tools.fuzz --seconds 600``.

Valid files are damaged and read in child processes with little memory and time. What comes of it
must be a result or an error of ours; anything else is a finding, whose file is kept.
"""

import argparse
import contextlib
import functools
import gc
import gzip
import io
import json
import logging
import os
import random
import struct
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
import torch
from PIL import Image

from tests.support import doors
from tests.support.confined import MIB, fork_server, limit_memory, status
from tests.support.data import tiff, write_checkpoint
from unet_core.config.presets import preset
from unet_core.errors import CheckpointError, ConfigError, ImageError, StoreError

MEMORY = 1024 * MIB
SECONDS_A_CASE = 120.0
BATCH = 100
KNOWN = "histogram size mismatch"
"""pyarrow 26 ends the process for a footer with wrong size statistics; nothing can be caught."""
ALLOWED = (ImageError, StoreError, CheckpointError, ConfigError)
NUMBERS = (0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 32767, 65535, 2**20, 2**31 - 1, 2**31,
           2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)  # fmt: skip
VALUES = (None, True, -1, 0, 1, 1.5, 2**31, 2**70, "", "x", "factory", [], {}, [[]], {"a": 1}, "é")
RANDOM = np.random.default_rng(0)
GRAY = RANDOM.integers(0, 256, (40, 48), dtype=np.uint8)
RGB = RANDOM.integers(0, 256, (40, 48, 3), dtype=np.uint8)


# --- examples -------------------------------------------------------------------------------


def images() -> list[bytes]:
    found = [imagecodecs.png_encode(RGB.astype(np.uint16) * 257)]
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        found.append(_saved(mode, "PNG"))
    for mode, kind in (("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("RGB", "BMP"),
                       ("P", "BMP"), ("P", "GIF")):  # fmt: skip
        found.append(_saved(mode, kind))
    return found


def _saved(mode: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(RGB).convert("L" if mode == "I;16" else mode)
    (picture.convert(mode) if mode == "I;16" else picture).save(buffer, format=kind)
    return buffer.getvalue()


def stills() -> list[bytes]:
    gray16, rgb16 = GRAY.astype(np.uint16) * 257, RGB.astype(np.uint16) * 257
    found = [_saved(mode, "PPM") for mode in ("1", "L", "RGB")]
    for pixels in (GRAY, RGB, np.dstack([RGB, GRAY]), gray16, rgb16):
        found += [imagecodecs.jpeg2k_encode(pixels, codecformat=kind) for kind in ("jp2", "j2k")]
        found += [imagecodecs.jpegxl_encode(pixels, usecontainer=packs) for packs in (False, True)]
        bits = 8 if pixels.itemsize == 1 else 12
        found.append(imagecodecs.avif_encode(pixels >> (16 - bits) % 8, bitspersample=bits))
    movie = np.stack([RGB, RGB])
    return [
        *found,
        _saved("RGB", "AVIF"),
        imagecodecs.avif_encode(movie),
        imagecodecs.jpegxl_encode(movie),
        imagecodecs.jpeg2k_encode(GRAY, codecformat="jp2", reversible=False),
        b"P1\n#c\n4 2\n0110 1001",
        b"P2 4 2 65535\n0 1 2 3 4 5 6 65535",
        b"P5 48 40 4095 " + gray16.astype(">u2").tobytes(),
    ]


def tiffs() -> list[bytes]:
    stack = RANDOM.integers(0, 65536, (3, 40, 48), dtype=np.uint16)
    tiles = {"tile": (16, 16)}
    return [
        tiff(GRAY),
        tiff(GRAY, compression="deflate", predictor=2, rowsperstrip=9),
        tiff(RGB, compression="lzw", **tiles),
        tiff(RGB, compression="jpeg", **tiles),
        tiff(GRAY, compression="jpeg2000", **tiles),
        tiff(GRAY, compression="zstd", bigtiff=True, **tiles),
        tiff(GRAY, compression="packbits"),
        tiff(GRAY.astype(np.float32), compression="deflate", predictor=3),
        tiff(GRAY > 99, photometric="miniswhite"),
        tiff(np.moveaxis(RGB, 2, 0), photometric="rgb", planarconfig="separate", **tiles),
        tiff(GRAY, photometric="palette", colormap=np.zeros((3, 256), np.uint16)),
        tiff(stack, photometric="minisblack", byteorder=">"),
        tiff(stack, ome=True, metadata={"axes": "CYX"}),
        tiff(stack, imagej=True, metadata={"axes": "ZYX"}, truncate=True),
        tiff(GRAY, metadata=None, extratags=[(42113, 2, 0, "7", True)], **tiles),
        _with_mask(description="Aperio Image Library v1\r\n|MPP = 0.5", **tiles),
        tiff(RGB, compression=33003, photometric="rgb", metadata=None, **tiles),
    ]


def _with_mask(**options: Any) -> bytes:
    """A geographic image with alpha, a mask and an overview."""
    buffer = io.BytesIO()
    geo = [
        (33550, 12, 3, (0.3, 0.3, 0.0), True),
        (33922, 12, 6, (0.0, 0.0, 0.0, 5e5, 4e6, 0.0), True),
        (34735, 3, 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), True),
    ]
    with tifffile.TiffWriter(buffer) as writer:
        rgba = np.dstack([RGB, GRAY // 200])
        about = {"photometric": "rgb", "extrasamples": ["unassalpha"], "metadata": None}
        writer.write(rgba, extratags=geo, **about, **options)
        writer.write(GRAY > 99, subfiletype=4, photometric="mask", metadata=None)
        writer.write(rgba[::2, ::2], subfiletype=1, **about)
    return buffer.getvalue()


def tars() -> list[bytes]:
    found = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for name in ("a.png", "a.mask.png", "dir/é.jpg", f"{'n' * 99}/{'m' * 90}.png"):
                info = tarfile.TarInfo(name)
                info.size = 700
                if kind == tarfile.PAX_FORMAT:
                    info.pax_headers = {"GNU.sparse.map": "0,300,900,400", "comment": "c" * 30}
                tar.addfile(info, io.BytesIO(bytes(700)))
        found.append(buffer.getvalue())
    return [*found, gzip.compress(found[1])]


def parquets() -> list[bytes]:
    cells = [bytes([n]) * n for n in range(60)]
    structs = [{"bytes": cell, "path": f"{len(cell)}.png"} for cell in cells]
    ids = [f"id {n}" for n in range(60)]
    return [
        _parquet({"image": cells, "id": ids}, row_group_size=20, compression="zstd"),
        _parquet({"image": structs, "id": ids}, row_group_size=30, use_dictionary=False),
        _parquet({"image": [cells[5]] * 60, "id": list(range(60))}, data_page_version="2.0"),
    ]


def _parquet(columns: dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def checkpoints() -> list[bytes]:
    spec = preset("padded", in_channels=1, width=1, depth=1)
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(write_checkpoint(Path(folder) / "x.safetensors", spec)).read_bytes()
    pickles = []
    for is_zip in (True, False):
        buffer = io.BytesIO()
        state = {"state_dict": {"a": torch.zeros(3, 3), "b": torch.ones(2)}, "epoch": 3}
        torch.save(state, buffer, _use_new_zipfile_serialization=is_zip)
        pickles.append(buffer.getvalue())
    return [ours, ours, *pickles]


def lists() -> list[bytes]:
    lines = [f'a/{n}.png,{n},"x{n}"' for n in range(30)]
    text = "\n".join(["uri,bytes,id", *lines]).encode()
    uris = [f"a/{n}.png" for n in range(30)]
    files = [{"key": "manifest.json"}]
    manifest = {"sourceBucket": "b", "fileSchema": "Bucket, Key, Size", "files": files}
    return [text, gzip.compress(text), _parquet({"uri": uris, "bytes": list(range(30))}),
            json.dumps(manifest).encode()]  # fmt: skip


def read_checkpoint(data: bytes) -> object:
    """Ours and those from elsewhere come in by different doors."""
    with contextlib.suppress(CheckpointError):
        doors.tensors(data)
    return doors.network(data)


def read_list(data: bytes) -> int:
    names = {b"PAR1": "x.parquet", b"\x1f\x8b": "x.csv.gz", b"{": "manifest.json"}
    name = next((n for magic, n in names.items() if data.startswith(magic)), "x.csv")
    return doors.listed(name, data, {})


DOORS: dict[str, tuple[Callable[[], list[bytes]], Callable[[bytes], object]]] = {
    "images": (images, doors.picture),
    "stills": (stills, doors.picture),
    "tiffs": (tiffs, doors.picture),
    "tars": (tars, functools.partial(_read := doors.rows, "t.tar", keys={"masks": "mask.png"})),
    "parquet": (parquets, functools.partial(_read, "t.parquet", keys={"id_column": "id"})),
    "checkpoints": (checkpoints, read_checkpoint),
    "lists": (lists, read_list),
}
"""Valid examples, and what reads them."""
ROWS_ALONE = ("images", "stills", "tiffs")


# --- damage ---------------------------------------------------------------------------------


def damaged(door: str, examples: list[bytes], seed: int, number: int) -> bytes:
    """The file of one case; the same for the same seed and number."""
    chance = random.Random(f"{seed} {door} {number}")
    data = bytearray(chance.choice(examples))
    is_packed = data.startswith(b"\x1f\x8b") and chance.random() < 0.9
    if is_packed:
        data = bytearray(gzip.decompress(data))
    if door == "checkpoints" and chance.random() < 0.5:
        data = _other_json(data, chance)
    else:
        for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
            _damage(data, examples, chance)
    if door == "tars" and chance.random() < 0.8:
        _sign(data)
    return gzip.compress(data, 1) if is_packed else bytes(data)


def _damage(data: bytearray, examples: list[bytes], chance: random.Random) -> None:
    near = chance.choice((64, 600, len(data) + 1))  # headers matter most; some are at the end
    at = min(chance.randrange(near), len(data))
    if chance.random() < 0.3:
        at = len(data) - at
    some = chance.choice((1, 2, 4, 16, 512))
    match chance.randrange(7):
        case 0 if data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        case 1:
            form = chance.choice("<>") + chance.choice("BHIQ")
            mask = (1 << 8 * struct.calcsize(form)) - 1
            number = struct.pack(form, chance.choice(NUMBERS) & mask)
            data[at : at + len(number)] = number
        case 2:
            del data[at : at + some]
        case 3:
            data[at:at] = data[at : at + some] * chance.choice((1, 2, 50))
        case 4:
            data[at : at + some] = chance.randbytes(some)
        case 5:
            del data[at:]
        case _:
            other = chance.choice(examples)
            start = chance.randrange(len(other))
            data[at : at + some] = other[start : start + some]


def _sign(data: bytearray) -> None:
    """Right checksums wherever a header may be, or nothing behind it would be reached."""
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def _other_json(data: bytearray, chance: random.Random) -> bytearray:
    """Safetensors whose header is JSON still, but of something else."""
    length = struct.unpack("<Q", data[:8])[0]
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return data
    where = header
    if chance.random() < 0.8:
        where = header["__metadata__"]
        key = chance.choice(sorted(where))
        try:
            inner = json.loads(where[key])
            where[key] = json.dumps(_replaced(inner, chance))
        except ValueError:
            where[key] = chance.choice(("", "null", "[" * 5000, "1" * 5000, "NaN"))
    else:
        header = _replaced(header, chance)
    text = json.dumps(header).encode()
    return bytearray(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _replaced(value: Any, chance: random.Random) -> Any:
    """JSON with one value replaced, somewhere."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        value[key] = _replaced(value[key], chance)
        return value
    return chance.choice(VALUES)


# --- the runs -------------------------------------------------------------------------------


def outcome(read: Callable[[bytes], object], data: bytes) -> str:
    """The class of what came of it; whatever is not allowed begins with an exclamation mark."""
    try:
        read(data)
    except ALLOWED as error:
        return type(error).__name__
    except BaseException as error:
        return f"!{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "result"


def _work(
    connection: Any, errors: Path, door: str, examples: list[bytes], seed: int, first: int
) -> None:
    logging.disable()
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)  # decoders in C print
    gc.freeze()
    begun = limit_memory(MEMORY)
    for number in range(first, first + BATCH):
        found = outcome(DOORS[door][1], damaged(door, examples, seed, number))
        if found != "result" and door in ROWS_ALONE:
            found = (
                found if found == "ImageError" else f"!{found.lstrip('!')}"
            )  # else it would stop the run
        gc.collect()  # errors and their frames go in circles, with all that they hold
        connection.send((number, found, status("VmHWM") - begun))


def fuzz(door: str, seconds: float, seed: int, keep: Path) -> tuple[Counter[str], int, list[str]]:
    """How often what came of it, the peak of memory in bytes, and the findings."""
    context = fork_server()
    examples, counts, peak, findings = DOORS[door][0](), Counter[str](), 0, list[str]()
    following, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        ours, theirs = context.Pipe(duplex=False)
        errors = keep / f"{door}.stderr"
        child = context.Process(
            target=_work, args=(theirs, errors, door, examples, seed, following)
        )
        child.start()
        theirs.close()
        last = following + BATCH
        while following < last and time.monotonic() < end:
            found = "!timeout"
            try:
                if ours.poll(SECONDS_A_CASE):
                    _, found, grown = ours.recv()
                    peak = max(peak, grown)
            except EOFError:
                child.join()
                is_known = KNOWN in errors.read_text(errors="replace")
                found = "aborted" if is_known else f"!died: exit code {child.exitcode}"
            counts[found.partition(":")[0]] += 1
            following += 1
            if found.startswith("!"):
                path = keep / f"{door}-{seed}-{following - 1}"
                path.write_bytes(damaged(door, examples, seed, following - 1))
                findings.append(f"door={door} seed={seed} case={following - 1} {found} {path}")
            if found.startswith(("!timeout", "!died", "aborted")):
                break
        child.kill()
        child.join()
    return counts, peak, findings


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="in all")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--door", choices=DOORS, action="append")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.randrange(2**32)
    options.keep.mkdir(parents=True, exist_ok=True)
    chosen, findings = options.door or list(DOORS), list[str]()
    print(f"seed {seed}\n{'door':12} {'cases':>8} {'seconds':>8} {'peak MiB':>9}  outcomes")
    for door in chosen:
        begun = time.monotonic()
        counts, peak, found = fuzz(door, options.seconds / len(chosen), seed, options.keep)
        findings += found
        spent, shown = time.monotonic() - begun, ", ".join(f"{k} {n}" for k, n in counts.items())
        print(f"{door:12} {counts.total():8} {spent:8.1f} {peak / MIB:9.0f}  {shown}", flush=True)
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
