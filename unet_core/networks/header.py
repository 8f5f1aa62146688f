"""The header of a checkpoint: network, tiling, classes and preprocessing, stored in the safetensors
metadata. No torch.
"""

import hashlib
import importlib.resources
import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from unet_core.config.presets import Factory, NetworkSpec, UNetSpec
from unet_core.config.sections import Background, StorageConfig
from unet_core.errors import CheckpointError, ConfigError, StoreError, one_line
from unet_core.images.guard import Stretch
from unet_core.images.preprocessing import Preprocessing
from unet_core.storage.store import Store
from unet_core.tiling.geometry import Tiling

FORMAT = "unet-jobs/2"
"""Version of the metadata; other versions are refused."""
KEYS = {
    "network": "model", "tiling": "tiling", "class_names": "classes",
    "preprocessing": "preprocessing", "palette": "palette", "training": "training",
    "background": "background",
}  # fmt: skip
"""Metadata key of each header field."""
DEFAULTS = {"training": "{}", "background": '"first"'}
"""JSON of the metadata that files may lack."""
MAX_HEADER_BYTES = 16 * 2**20
"""Longest safetensors header that is read: far above real ones, harmless in memory."""
MAX_SIZE = 2**16
"""Largest class count, channel count or length in pixels; class ids are 16 bits."""
DEFAULT_COLORS = (
    (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115),
    (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
"""Okabe and Ito's palette, which people with colour blindness can tell apart."""

Byte = Annotated[int, Field(ge=0, le=255)]


@dataclass(frozen=True)
class Header:
    """Description of a checkpoint's network; raises ConfigError if fields contradict each other."""

    network: NetworkSpec
    tiling: Tiling
    """Tile geometry, measured when the checkpoint was made."""
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    palette: tuple[tuple[Byte, Byte, Byte], ...] = ()
    """RGB of each class id; empty: default colours."""
    training: dict[str, Any] = field(default_factory=dict)
    """Provenance: config, steps, scores or source."""
    background: Background = "first"
    """Whether class 0 is background."""

    def __post_init__(self) -> None:
        if len(self.class_names) != self.classes:
            raise ConfigError(
                f"model.classes: got {len(self.class_names)} names, but the network has "
                f"{self.classes}"
            )
        wanted, channels = self.preprocessing, self.network.in_channels
        if wanted.channels != channels:
            raise ConfigError(
                f"model.color: {wanted.color} images have {wanted.channels} channels, but the "
                f"network takes {channels}"
            )

    @property
    def classes(self) -> int:
        """Number of class ids in masks: 2 for a network with one logit."""
        return max(2, self.network.classes)

    @property
    def first_foreground(self) -> int:
        """Lowest id of a foreground class."""
        return int(self.background == "first")


HEADERS = TypeAdapter(Header)
BUILTIN_STRETCHES = {"builtin:nuclei": Stretch(noise=1 / 15, background=1 / 6)}
"""Stretches of training images by builtin checkpoint, which itself never changes. Of ``nuclei``:
the noise of its images is at most 0.065 spans, and the background of all but two in a hundred
varies by less than 0.12; the network finds nothing in noise up to 0.1 and gradients up to 0.3."""


def trained_stretch(checkpoint: str, header: Header) -> Stretch | None:
    """Return the largest stretch of the training images of a checkpoint; None if not known.

    Raises CheckpointError if what its metadata say is damaged.
    """
    if checkpoint in BUILTIN_STRETCHES:
        return BUILTIN_STRETCHES[checkpoint]
    if not (recorded := header.training.get("stretch")):
        return None
    try:
        found = Stretch(**recorded)
        usable = min(found) > 0 and all(map(math.isfinite, found))
    except TypeError as error:
        raise CheckpointError(f"{checkpoint}: its metadata is damaged: training.stretch") from error
    return found if usable else None


def palette_of(classes: int) -> tuple[tuple[int, int, int], ...]:
    """Return default colours for ``classes`` ids; they repeat after eight."""
    return tuple(DEFAULT_COLORS[i % len(DEFAULT_COLORS)] for i in range(classes))


def locate(checkpoint: str) -> str:
    """Resolve ``builtin:NAME`` to a file of this package; raises CheckpointError if unknown."""
    if not checkpoint.startswith("builtin:"):
        return checkpoint
    folder = importlib.resources.files("unet_core") / "builtin"
    name = checkpoint.removeprefix("builtin:")
    known = sorted(p.name.removesuffix(".safetensors") for p in folder.iterdir())
    if name not in known:
        shipped = ", ".join(f"builtin:{k}" for k in known if not k.startswith("_"))
        raise CheckpointError(f"model.checkpoint: {checkpoint} does not exist; shipped: {shipped}")
    return str(folder / f"{name}.safetensors")


def read_header_and_digest(
    checkpoint: str, storage: StorageConfig | None, factory: str
) -> tuple[Header, str]:
    """Read a checkpoint once: its header, and the SHA-256 of the whole file, hex.

    Raises CheckpointError if it is foreign or damaged, or if ``factory`` is not the one it names.
    """
    data = read_bytes(checkpoint, storage)
    header = read_header(checkpoint, storage, data)
    require_factory(checkpoint, header, factory)
    return header, hashlib.sha256(data).hexdigest()


def read_header(
    checkpoint: str, storage: StorageConfig | None = None, data: bytes | None = None
) -> Header:
    """Read a checkpoint's header, without torch; raises CheckpointError if foreign or damaged.

    ``data``: all bytes of the file, if they have been read.
    """
    metadata = read_metadata(checkpoint, storage, data)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint}: its format is {metadata.get('format')!r}, allowed: {FORMAT!r}; "
            "train it with `unet-jobs train`, or bring weights from elsewhere with "
            "`unet-jobs import-weights`"
        )
    try:
        texts = DEFAULTS | metadata
        table = {name: json.loads(texts[key]) for name, key in KEYS.items()}
        header = HEADERS.validate_json(json.dumps(table), strict=True)
        _check_sizes(header)
    except (KeyError, ValueError, RecursionError, ConfigError) as error:
        raise CheckpointError(
            f"{checkpoint}: its metadata is damaged: {one_line(error)}"
        ) from error
    return header


def read_metadata(
    checkpoint: str, storage: StorageConfig | None = None, data: bytes | None = None
) -> dict[str, str]:
    """Read a safetensors file's metadata from ``data``, all its bytes, or else by two range reads.

    Raises CheckpointError for other files.
    """
    prefix = read_bytes(checkpoint, storage, 0, 8) if data is None else data[:8]
    length = int.from_bytes(prefix, "little") if len(prefix) == 8 else 0
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(f"{checkpoint}: not a safetensors file; convert it first")
    text = read_bytes(checkpoint, storage, 8, 8 + length) if data is None else data[8 : 8 + length]
    try:
        metadata: dict[str, str] = json.loads(text).get("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("metadata are texts")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint}: its safetensors header is damaged") from error
    return metadata


def _check_sizes(header: Header) -> None:
    """Raise ValueError for sizes that are not plausible and would exhaust memory."""
    network, tiling, sides = header.network, header.tiling, header.tiling.sides
    if network.classes >= MAX_SIZE:
        raise ValueError(f"{network.classes} classes; one id of {MAX_SIZE} is reserved")
    counts = (
        network.classes, network.in_channels, tiling.channels, tiling.stride, sides.smallest,
        sides.step,
    )  # fmt: skip
    lengths = (tiling.margin, tiling.halo, tiling.receptive_field)
    if min(counts) < 1 or min(lengths) < 0 or max(counts + lengths) > MAX_SIZE:
        raise ValueError(f"{network} and {tiling} hold numbers that are not from 1 to {MAX_SIZE}")
    if isinstance(network, UNetSpec) and network.sides != sides:
        raise ValueError(f"sides are {sides}, but those of its network are {network.sides}")


def require_factory(checkpoint: str, header: Header, allowed: str) -> None:
    """Raise CheckpointError unless ``allowed`` is the factory that the checkpoint names.

    The user must name it, because a downloaded file must not decide which code is imported.
    """
    network = header.network
    if isinstance(network, UNetSpec) and allowed:
        raise CheckpointError(f"model.factory is {allowed}, but {checkpoint} is a U-Net of presets")
    if isinstance(network, Factory) and (named := network.factory) != allowed:
        raise CheckpointError(
            f"{checkpoint} is made for a network that {named} builds; if you trust that function, "
            f"called with {network.arguments}, say model.factory = {named!r} (now it is "
            f"{allowed!r})"
        )


def checkpoint_digest(checkpoint: str, storage: StorageConfig | None = None) -> str:
    """Compute the SHA-256 of the whole file, hex; raises CheckpointError if it cannot be read."""
    return hashlib.sha256(read_bytes(checkpoint, storage)).hexdigest()


def read_bytes(
    checkpoint: str,
    storage: StorageConfig | None,
    start: int | None = None,
    stop: int | None = None,
) -> bytes:
    """Read a checkpoint file, or a range of it; raises CheckpointError if it cannot be read."""
    try:
        return Store(locate(checkpoint), storage).read("", start, stop)
    except StoreError as error:
        hint = f"; the network of a training is {checkpoint}/best.safetensors"
        is_file = checkpoint.endswith(".safetensors")
        raise CheckpointError(f"model.checkpoint: {error}{'' if is_file else hint}") from error
