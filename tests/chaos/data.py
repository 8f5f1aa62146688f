"""Small inputs drawn from a seed: tars or loose images, some of them deterministically bad."""

import gzip
import io
import json
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unet_core.synthetic import nuclei, png

SIZES = ((16, 16), (20, 33), (48, 40), (70, 90), (130, 64))
BAD = {"truncated": "decode", "text": "decode", "empty": "empty"}
"""How an image is spoilt, and the error code of its row."""
FACTORY = "tests.chaos.faults:network"


@dataclass(frozen=True)
class Image:
    """A row that a run must have."""

    image_id: str
    shard: str
    """What it shares with the other images of its shard: a tar, or a number."""
    code: str = ""
    """Its error code; empty if it must be segmented."""


@dataclass(frozen=True)
class Data:
    """An input, and what must become of it."""

    root: Path
    images: tuple[Image, ...]
    shard_images: int = 0
    """Of loose images; 0 for tars."""

    @property
    def shards(self) -> list[str]:
        return sorted({image.shard for image in self.images})

    @property
    def segmented(self) -> list[Image]:
        return [image for image in self.images if not image.code]

    def table(self, checkpoint: str, out: Path, **sections: dict) -> dict[str, dict]:
        """The config that segments it, with sections of the caller's own."""
        table = {
            "input": {"uri": str(self.root), "shard_images": self.shard_images or 256},
            "model": {"checkpoint": checkpoint, "factory": FACTORY},
            "tile": {"size": 48},
            "output": {"uri": str(out), "report": False},
            "workers": {"count": "inline"},
            "errors": {"max_failed_images": 1.0},
        }
        if not self.shard_images:
            table["input"]["masks"] = "mask.png"
        for name, keys in sections.items():
            table[name] = {**table.get(name, {}), **keys}
        return table


def write_toml(table: dict[str, dict], path: Path) -> Path:
    lines: list[str] = []
    for section, keys in table.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def make(root: Path, draw: random.Random, is_loose: bool) -> Data:
    """A folder of images, or of tars of which one may be packed and one cut short."""
    root.mkdir(parents=True)
    return _loose(root, draw) if is_loose else _tars(root, draw)


def _loose(root: Path, draw: random.Random) -> Data:
    shard_images, images = draw.randint(2, 4), []
    for number in range(draw.randint(12, 20)):
        name = f"{number % 3}/i{number:02d}.png"
        spoilt = draw.choice(list(BAD)) if number % shard_images and draw.random() < 0.25 else ""
        images.append((name, spoilt))
    images.sort()
    rows = []
    for number, (name, spoilt) in enumerate(images):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(_spoil(_picture(draw)[0], spoilt))
        rows.append(Image(name, str(number // shard_images), BAD.get(spoilt, "")))
    return Data(root, tuple(rows), shard_images)


def _tars(root: Path, draw: random.Random) -> Data:
    rows: list[Image] = []
    count = draw.randint(6, 8)
    short, packed = draw.randrange(2 * count), draw.randrange(2 * count)
    for number in range(count):
        name = f"{number % 2}/t{number}.tar" + (".gz" if number == packed != short else "")
        (root / name).parent.mkdir(exist_ok=True)
        members, keys = [], []
        for image in range(draw.randint(2, 4)):
            spoilt = draw.choice(list(BAD)) if image and draw.random() < 0.3 else ""
            data, truth = _picture(draw)
            members += [(f"i{image}.png", _spoil(data, spoilt)), (f"i{image}.mask.png", truth)]
            keys.append((f"i{image}", BAD.get(spoilt, "")))
        if draw.random() < 0.3:  # the first one's id again
            members.append(("i0.png", _picture(draw)[0]))
            keys.append(("i0", "duplicate_id"))
        if number == short:
            members.append(("last.png", draw.randbytes(1000)))
        content = _tar(members)
        if number == short:  # in the middle of the last member
            content = content[: len(content.rstrip(b"\0")) - 500]
            keys.append(("", "tar"))
        elif number == packed:
            content = gzip.compress(content, mtime=0)
        (root / name).write_bytes(content)
        rows += [Image(f"{name}/{key}" if key else name, name, code) for key, code in keys]
    return Data(root, tuple(rows))


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _picture(draw: random.Random) -> tuple[bytes, bytes]:
    image_HW, mask_HW = nuclei(*draw.choice(SIZES), np.random.default_rng(draw.getrandbits(32)))
    return png(image_HW), png(mask_HW)


def _spoil(data: bytes, how: str) -> bytes:
    spoilt = {"truncated": data[: len(data) * 2 // 3], "text": b"not an image", "empty": b""}
    return spoilt.get(how, data)
