"""Sections that several configs share: input, storage, output, workers, normalization.

Imports pydantic and nothing heavier, so that a config error costs less than a second.
"""

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from unet_core.config.uris import Uri, UriOrNone, absolute
from unet_core.errors import ConfigError

Auto = Literal["auto"]
Count = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number32 = Annotated[float, Field(gt=-3.4e38, lt=3.4e38)]
"""A number that 32 bits can hold."""
FactoryName = Annotated[str, Field(pattern=r"^([\w.]+:\w+)?$")]
"""``package.module:function``, or empty."""

PixelValues = Number32 | Annotated[list[Number32], Field(min_length=1)]
IGNORE_INDEX = 255
Background = Literal["first", "none"]
"""Which class is background: the one with id 0, or none."""


RENAMED = {"optimiser": "optimizer", "normalisation": "normalization"}
"""Keys by their old names, which are read for ever: in TOML files, checkpoints and folders."""


def with_new_names(table: dict[str, Any]) -> dict[str, Any]:
    """Rename keys of a table that have old names; dotted keys by their last part, but not those in
    ``arguments``, whose names are the user's.

    Raises ValueError if a key is given by both names.
    """
    new = {}
    for key, value in table.items():
        section, dot, name = key.rpartition(".")
        is_ours = not section.endswith("arguments")
        new_key = f"{section}{dot}{RENAMED.get(name, name)}" if is_ours else key
        if new_key != key and new_key in table:
            raise ValueError(f"{key} is the old name of {new_key}; give one of them")
        new[new_key] = value
    return new


class Section(BaseModel):
    """A TOML table: unknown keys are refused, values do not change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, table: Any) -> Any:
        return with_new_names(table) if isinstance(table, dict) else table


ConfigT = TypeVar("ConfigT", bound=Section)


class InputConfig(Section):
    """Where the images are and how they are grouped into shards."""

    uri: Uri
    """Folder, prefix, tar or image: a path, or ``s3://``, ``gs://``, ``abfs://``."""
    format: Literal["auto", "folder", "webdataset", "parquet", "list"] = "auto"
    """``folder``: loose images at any depth; ``webdataset``: tars, a shard each; ``parquet``:
    images in a column; ``list``: a Parquet or CSV list of URIs, or an S3 Inventory (said, never
    found by ``auto``)."""
    shard_images: Count = 256
    """Loose images per shard, at most."""
    shard_mb: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 512.0
    """Megabytes of loose images per shard, at most, unless a single one is larger: a shard of large
    files is one worker's work for long, and is done again as a whole."""
    masks: UriOrNone = ""
    """Truth. Tar: member suffix (``mask.png``). Folder: another folder if it holds a ``/``,
    else a stem suffix (``_mask``). Parquet and lists: column. Empty: no truth."""
    label_map: dict[int, int] = {}
    """Mask value → class id, applied to truth; values not named stay as they are."""
    ignore_index: Annotated[int, Field(ge=0, le=65535)] = IGNORE_INDEX
    """Truth pixels of this value (after ``label_map``) count nowhere."""
    on_missing_mask: Literal["skip", "background", "refuse"] = "skip"
    """With ``masks``, an image that has none: leave it out of every score, compare it with a truth
    that is all class 0, or stop. Where only reading tells (tars, Parquet), ``refuse`` makes it a
    failed row."""
    image_column: str = "image"
    """Parquet: the column of encoded images, binary or ``struct<bytes, path>``."""
    id_column: str = ""
    """Parquet: the column of image ids; empty: ``<file>#<row>``."""
    allow: list[Uri] = []
    """Lists: prefixes below which their URIs must lie; empty: the folder of the list."""
    channels: list[Annotated[int, Field(strict=True, ge=0)]] = []
    """Which channels count, from 0, as stored; empty: gray or RGB without alpha, or all."""
    nodata: Auto | Literal["none", "nan", "inf", "-inf"] | float = "auto"
    """Value that means that there is no pixel. ``auto``: as the file says, by nodata value, alpha
    or mask page; a number or ``nan``: this instead of the file's nodata value; ``none``: everything
    is a pixel."""
    statistics: Auto | Literal["image", "guarded", "group", "dataset"] = "auto"
    """What a stretch between percentiles (or mean and deviation) is measured on: each ``image``;
    the same, limited to what the network was trained on, so that noise is not stretched to objects
    (``guarded``); images of a folder (``group``), or of the whole input (``dataset``), by a sample.
    ``auto``: guarded for builtin checkpoints, else by image."""
    low: PixelValues | None = None
    """With ``high``: pixel values that become 0 and 1 in every image, one or one for each channel;
    no statistics are measured then."""
    high: PixelValues | None = None
    pages: Literal["refuse", "expand"] = "refuse"
    """Several pages of a TIFF: a failed row, or an image each (``<image_id>#<page>``)."""
    axes: Annotated[str, Field(pattern="^[A-Z]*$")] = ""
    """Axes of TIFFs whose metadata do not say them, e.g. ``CYX``: pages are channels."""
    max_pixels: Count = 2**27
    """Height × width above which an image is not decoded whole: a large TIFF is read by window (up
    to 256 times as many), others become failed rows."""

    @field_validator("nodata")
    @classmethod
    def _names_nan(cls, value: float | str) -> float | str:
        return value if isinstance(value, str) or math.isfinite(value) else str(value)  # for JSON

    @model_validator(mode="after")
    def _limits_go_alone(self) -> "InputConfig":
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high go together: pixel values that become 0 and 1")
        if self.low is not None and self.statistics != "auto":
            raise ValueError(f"low and high exclude statistics = {self.statistics!r}")
        return self

    @property
    def mask_folder(self) -> str:
        """Another folder, if that is where the truth lies."""
        return self.masks if "/" in self.masks else ""

    @property
    def missing_mask(self) -> str:
        """``on_missing_mask`` where truth is to be read, else ``skip``."""
        return self.on_missing_mask if self.masks else "skip"

    def require_free_ignore_index(self, classes: int) -> None:
        """Raises ConfigError where truth is to be read and the default means a class."""
        if self.masks and IGNORE_INDEX == self.ignore_index < classes:
            raise ConfigError(
                f"input.ignore_index is {IGNORE_INDEX} by default, which is one of {classes} "
                "classes here; set it to another value, e.g. 65535"
            )

    def with_absolute_paths(self) -> "InputConfig":
        """The same, with plain paths that mean elsewhere what they mean in this process."""
        masks = absolute(self.masks) if self.mask_folder else self.masks
        allow = [absolute(prefix) for prefix in self.allow]
        return self.model_copy(update={"uri": absolute(self.uri), "masks": masks, "allow": allow})

    def paths(self, section: str) -> dict[str, str]:
        """Where data is read: URIs by their keys in a section of a config."""
        masks = {f"{section}.masks": self.mask_folder} if self.mask_folder else {}
        return {f"{section}.uri": self.uri, **masks}


class FolderConfig(Section):
    """Where results go."""

    uri: Uri
    """The run folder."""
    report: bool = True
    """Write ``report.html`` there at the end."""


class ShareConfig(Section):
    """What each worker gets."""

    gpus: Auto | Number = "auto"
    """GPUs each, for actors fractions too; 0 means CPU."""
    cpus: Auto | Number = "auto"
    """CPU cores each."""


class StorageConfig(Section):
    """How object storage is reached. Credentials come from the environment or the provider chain
    (variables, profiles, instance roles) and are never written here.
    """

    endpoint_url: str = ""
    """For stores other than AWS, e.g. ``http://minio:9000``."""
    region: str = ""
    profile: str = ""
    """Name of a profile in the shared AWS configuration."""
    anonymous: bool = False
    """Public buckets, without credentials."""
    requester_pays: bool = False
    encryption: Literal["", "AES256", "aws:kms"] = ""
    """Server-side encryption of what is written."""
    kms_key: str = ""
    """Key id for ``aws:kms``; empty: the bucket's default."""
    role: str = ""
    """ARN of a role to assume with the credentials at hand."""
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0
    """How long one read or write is tried again while the store is busy or away."""
    shared: bool = False
    """Plain paths are one file system, seen by every node of the cluster (NFS and the like)."""

    @field_validator("endpoint_url")
    @classmethod
    def _no_credentials_in_url(cls, url: str) -> str:
        if "@" in url:
            raise ValueError("holds credentials; give them in the environment instead")
        return url
