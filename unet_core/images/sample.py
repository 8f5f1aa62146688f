"""An image as an input gives it: named, not yet decoded."""

from collections.abc import Callable
from dataclasses import dataclass

from unet_core.errors import ImageError
from unet_core.storage.ranges import Ranged

LARGE_FILE_BYTES = 64 * 2**20
"""Above this, a file is looked at before it is read whole: it may be read by window."""


@dataclass(frozen=True)
class Sample:
    """One image as it was found: named, not yet decoded.

    Reading raises StoreError, and ImageError (``missing``, ``changed``, ``archived``,
    ``forbidden``) where it is the image alone that cannot be read as it was listed.
    """

    image_id: str
    key: str
    source_uri: str
    read: Callable[[], bytes]
    read_mask: Callable[[], bytes] | None = None
    failure: ImageError | None = None
    """Set by the reader where there is nothing to decode."""
    open: Callable[[], Ranged] | None = None
    """Opens the image for range reads, if it is a file of its own."""
    open_mask: Callable[[], Ranged] | None = None
    read_world: Callable[[], bytes] | None = None
    """Reads the world file of the image, if there is one."""
    encoded_bytes: int = 0
    """Bytes of image and truth that are in memory before decoding: tars are streamed."""

    @property
    def bare(self) -> "Sample":
        """The sample without its readers, which hold the encoded bytes."""
        return Sample(self.image_id, self.key, self.source_uri, bytes)
