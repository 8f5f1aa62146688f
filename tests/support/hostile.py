"""What files made to do harm are made of."""

import io
import struct
import zlib

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.confined import MIB


def squeezed(size: int, window: int = 15) -> bytes:
    """So many zeros, packed."""
    packer = zlib.compressobj(9, zlib.DEFLATED, window)
    packed = [packer.compress(bytes(MIB)) for _ in range(size // MIB)]
    return b"".join([*packed, packer.flush()])


def packed(*parts):
    """Bytes, and numbers of zeros, in gzip."""
    packer, out = zlib.compressobj(1, zlib.DEFLATED, 31), []
    for part in parts:
        pieces = [part] if isinstance(part, bytes) else [bytes(MIB)] * (part // MIB)
        out += [packer.compress(piece) for piece in pieces]
    return b"".join([*out, packer.flush()])


def parquet(column, name="image", ids=None, **options):
    buffer = io.BytesIO()
    table = {name: column} | ({"id": ids} if ids is not None else {})
    pq.write_table(pa.table(table), buffer, **options)
    return buffer.getvalue()


NOT_UTF8 = pa.StringArray.from_buffers(
    2, pa.py_buffer(struct.pack("<3i", 0, 1, 2)), pa.py_buffer(b"\xff\xfe")
)
