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

    Reading raises StoreError, and ImageError (``missing``, ``changed``) where the image alone is
    not what it was when the run began.
    """

    image_id: str
    key: str
    source_uri: str
    read: Callable[[], bytes]
    read_mask: Callable[[], bytes] | None = None
    failure: ImageError | None = None
    """Set where the reader already knows that there is nothing to decode."""
    open: Callable[[], Ranged] | None = None
    """Where the image is a file of its own, which need not be read whole."""
    open_mask: Callable[[], Ranged] | None = None
    encoded_bytes: int = 0
    """What the image and its truth hold in memory before they are read: tars are streamed."""

    @property
    def bare(self) -> "Sample":
        """Its names alone, for what is left when everything is read."""
        return Sample(self.image_id, self.key, self.source_uri, bytes)
