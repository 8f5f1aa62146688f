"""What people write: TOML files and ``section.key=value`` overrides, checked before anything runs.

Imports pydantic and nothing heavier, so that a mistake costs less than a second.
"""

import copy
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from unet_core.errors import ConfigError
from unet_core.findings import sentences

Auto = Literal["auto"]
Count = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FactoryName = Annotated[str, Field(pattern=r"^([\w.]+:\w+)?$")]
"""``package.module:function``, or empty."""

SPANS = {"percentile": (0, 1, 99.8, 100), "range": (-3.4e38, 0, 3.4e38, 3.4e38)}
"""By ``normalisation``: the least ``low``; ``low`` and ``high`` where they are not given (of
``range``, ``high`` is at most that, the largest pixel value); the largest ``high``.
"""
IGNORE_INDEX = 255
ENOUGH_IMAGES = 1000
"""Before so many, the share of failed ones says nothing, except at the end."""
AUTHORITY = re.compile(r"(\w+)://([^/]*)")
PROTOCOLS = ("file", "local", "memory", "s3", "gs", "abfs")


def allowed_uri(uri: str) -> str:
    """Refuse what fsspec would resolve but no job should: chains, parent steps, odd protocols,
    credentials (which no message repeats).
    """
    if not uri.strip():
        raise ValueError("is empty; give a path")
    if has_credentials(uri):
        raise ValueError("holds credentials; give them in the environment instead")
    if "::" in uri:
        raise ValueError(f"got {uri!r}, but chained URIs (::) are not allowed")
    protocol, separator, _ = uri.partition("://")
    if separator and protocol not in PROTOCOLS:
        raise ValueError(
            f"got {uri!r}, but {protocol}:// is not one of the protocols that are read; "
            f"allowed: plain paths, {', '.join(p + '://' for p in PROTOCOLS)}"
        )
    if separator and ".." in uri.split("/"):
        raise ValueError(f"got {uri!r}, but '..' is not allowed in a URI")
    return uri


def _allowed_or_known(name: str) -> str:
    is_uri = name and not name.startswith("builtin:")
    return allowed_uri(name) if is_uri else name


Uri = Annotated[str, AfterValidator(allowed_uri)]
UriOrNone = Annotated[str, AfterValidator(_allowed_or_known)]
"""Empty, ``builtin:NAME``, or a URI."""


class Section(BaseModel):
    """A TOML table: unknown keys are refused, values do not change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ConfigT = TypeVar("ConfigT", bound=Section)


def require_span(section: ConfigT) -> ConfigT:
    """The validator of a section with ``normalisation``, ``low`` and ``high``, between which
    there must be something.
    """
    kind, low, high = (getattr(section, name) for name in ("normalisation", "low", "high"))
    if kind not in SPANS:
        if (low, high) != (None, None):
            raise ValueError(f"low and high belong to {' and '.join(SPANS)}, not to {kind}")
        return section
    least, usual_low, usual_high, most = SPANS[kind]
    low, high = usual_low if low is None else low, usual_high if high is None else high
    if not least <= low < high <= most:
        numbers = "numbers from 0 to 100" if kind == "percentile" else "finite numbers"
        raise ValueError(
            f"low is {low:g} and high {high:g}, but {kind} needs {numbers}, low < high"
        )
    return section


class InputConfig(Section):
    """Where the images are and how they are grouped into shards."""

    uri: Uri
    """Folder, prefix, tar or image: a path, or ``s3://``, ``gs://``, ``abfs://``."""
    format: Literal["auto", "folder", "webdataset", "parquet", "list"] = "auto"
    """``folder``: loose images at any depth; ``webdataset``: tars, a shard each; ``parquet``:
    images in a column; ``list``: a Parquet or CSV list of URIs, or an S3 Inventory (said, never
    found by ``auto``)."""
    shard_images: Count = 256
    """Loose images per shard."""
    masks: UriOrNone = ""
    """Truth. Tar: member suffix (``mask.png``). Folder: another folder if it holds a ``/``,
    else a stem suffix (``_mask``). Parquet and lists: column. Empty: no truth."""
    label_map: dict[int, int] = {}
    """Mask value → class id, applied to truth; values not named stay as they are."""
    ignore_index: Annotated[int, Field(ge=0, le=65535)] = IGNORE_INDEX
    """Truth pixels of this value (after ``label_map``) count nowhere."""
    image_column: str = "image"
    """Parquet: the column of encoded images, binary or ``struct<bytes, path>``."""
    id_column: str = ""
    """Parquet: the column of image ids; empty: ``<file>#<row>``."""
    allow: list[Uri] = []
    """Lists: prefixes below which their URIs must lie; empty: the folder of the list."""
    channels: list[Annotated[int, Field(strict=True, ge=0)]] = []
    """Which channels count, from 0, as stored; empty: gray or RGB without alpha, or all."""
    pages: Literal["refuse", "expand"] = "refuse"
    """Several pages of a TIFF: a failed row, or an image each (``<image_id>#<page>``)."""
    axes: Annotated[str, Field(pattern="^[A-Z]*$")] = ""
    """Axes of TIFFs whose metadata do not say them, e.g. ``CYX``: pages are channels."""
    max_pixels: Count = 2**27
    """Height × width above which an image is not decoded whole: a large TIFF is read by window (up
    to 256 times as many), others become failed rows."""

    @property
    def mask_folder(self) -> str:
        """Another folder, if that is where the truth lies."""
        return self.masks if "/" in self.masks else ""

    def require_free_ignore_index(self, classes: int) -> None:
        """Raises ConfigError where truth is to be read and the default means a class."""
        if self.masks and IGNORE_INDEX == self.ignore_index < classes:
            raise ConfigError(
                f"input.ignore_index is {IGNORE_INDEX} by default, which is one of {classes} "
                "classes here; set it to another value, e.g. 65535"
            )

    def from_here(self) -> "InputConfig":
        """The same, with plain paths that mean elsewhere what they mean in this process."""
        masks = absolute(self.masks) if self.mask_folder else self.masks
        allow = [absolute(prefix) for prefix in self.allow]
        return self.model_copy(update={"uri": absolute(self.uri), "masks": masks, "allow": allow})

    def places(self, section: str) -> dict[str, str]:
        """Where data is read: URIs by their keys in a section of a config."""
        masks = {f"{section}.masks": self.mask_folder} if self.mask_folder else {}
        return {f"{section}.uri": self.uri, **masks}


class ModelConfig(Section):
    """Which network segments the images."""

    checkpoint: Annotated[UriOrNone, Field(min_length=1)] = "builtin:nuclei"
    """``builtin:NAME``, or the path of a ``.safetensors`` file."""
    factory: FactoryName = ""
    """``package.module:function``, where the checkpoint names one: leave to run it."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """One-logit models: foreground where sigmoid(logit) is above this."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """``auto``: a GPU if there is one."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network; the halves are meant for GPUs, and differ in pixels near a class's border."""


class TileConfig(Section):
    """How large images are cut and how tiles are stacked."""

    size: Auto | Annotated[int, Field(strict=True, ge=16)] = "auto"
    """Longest side of a window in pixels, halo included; an image that fits is one tile. ``auto``:
    about 1024, more where the network sees far."""
    batch: Auto | Count = "auto"
    """Full-size tiles per batch; smaller tiles fill the same number of pixels."""
    mode: Literal["exact", "blend"] = "exact"
    """``exact``: as one pass over the whole image; ``blend``: tiles overlap by half and are
    averaged with Gaussian weights, as networks that cannot be exact always are."""
    tta: Literal["none", "flips", "dihedral"] = "none"
    """Mean over 4 flips, or over the 8 symmetries of the square; that many times the work."""


class FolderConfig(Section):
    """Where results go."""

    uri: Uri
    """The run folder."""
    report: bool = True
    """Write ``report.html`` there at the end."""


class OutputConfig(FolderConfig):
    """Where the run folder is and how masks are stored in it."""

    encoding: Literal["raw", "png"] = "raw"
    """``raw``: C-order bytes, compressed by Parquet; ``png``: what dataset viewers show."""
    probabilities: Literal["none", "uint8", "float16"] = "none"
    """Keep them beside the masks, one plane per logit; ``uint8`` is round(255 p)."""


class ErrorsConfig(Section):
    """What may go wrong before a run stops; never part of its identity."""

    max_failed_images: (
        Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(strict=True, ge=0, le=1)]
    ) = 0.01
    """A number of images (``100``), or a share of them (``0.01``), which is judged after 1,000
    images or at the end."""
    max_attempts: Count = 2
    """Deaths of actors that a shard may cause alone before its images are tried one by one."""
    stall_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0
    """Seconds without a step, beyond what ``storage.deadline_s`` and size explain; then a shard's
    actor is given up, or an image that is tried alone."""

    def are_too_many(self, failed: int, seen: int, at_end: bool = False) -> bool:
        """Whether more images failed, of those that were seen, than ``max_failed_images``."""
        if isinstance(self.max_failed_images, int):
            return failed > self.max_failed_images
        return (at_end or seen >= ENOUGH_IMAGES) and failed > self.max_failed_images * seen


class ShareConfig(Section):
    """What each worker gets."""

    gpus: Auto | Number = "auto"
    """GPUs each, for actors fractions too; 0 means CPU."""
    cpus: Auto | Number = "auto"
    """CPU cores each."""


class WorkersConfig(ShareConfig):
    """Who does the work; never part of a run's identity."""

    count: Auto | Literal["inline"] | Count = "auto"
    """Actors. ``inline``: this process, no Ray. ``auto``: one per GPU of the cluster, as nodes join
    and leave, or inline where there is at most one GPU and no cluster."""
    max: Auto | Count = "auto"
    """With ``count = "auto"``: so many actors are asked for, also of nodes that are yet to come;
    ``auto``: as many as the nodes of the moment can hold."""
    accelerator_type: Annotated[str, Field(pattern=r"^[\w.-]*$")] = ""
    """Only nodes with this GPU, as Ray names it: ``L4``, ``A100``, ``H100``."""
    mixed_devices: bool = False
    """Let actors whose device or versions differ from those in ``run.json`` take part."""

    @model_validator(mode="after")
    def _max_goes_with_auto(self) -> "WorkersConfig":
        if self.max != "auto" and self.count != "auto":
            raise ValueError(f"max goes with count = 'auto', but count is {self.count!r}")
        return self


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


class PredictConfig(Section):
    """Everything that ``unet-jobs predict`` needs."""

    input: InputConfig
    model: ModelConfig = ModelConfig()
    tile: TileConfig = TileConfig()
    output: OutputConfig
    workers: WorkersConfig = WorkersConfig()
    errors: ErrorsConfig = ErrorsConfig()
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _output_apart_from_input(self) -> "PredictConfig":
        refuse_nesting("output.uri", self.output.uri, self.read_places)
        return self

    @property
    def read_places(self) -> dict[str, str]:
        """Where data is read: URIs by their keys."""
        return self.input.places("input")


class ForeignConfig(Section):
    """What weights from elsewhere do not say of themselves."""

    layout: str = ""
    """Whose key names they have; empty: found by the keys."""
    factory: FactoryName = ""
    """``package.module:function`` that makes the network; empty: a U-Net of a known layout."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the factory."""
    stride: Auto | Count = "auto"
    """Pixels by which the input of the factory's network must move for its output to move along;
    ``auto``: found by trying."""
    color: Auto | Literal["gray", "rgb"] | Annotated[int, Field(strict=True, ge=1)] = "auto"
    """What images are converted to; a number: that many channels as they are; ``auto``: by the
    network's input channels, which a factory does not tell."""
    normalisation: Literal["percentile", "range", "zscore"] = "range"
    """Per image and channel: percentiles, a fixed range, or mean and standard deviation."""
    low: float | None = None
    """What becomes 0: a percentile (1), or for ``range`` a pixel value (0)."""
    high: float | None = None
    """What becomes 1: a percentile (99.8), or a pixel value (the type's largest; 1 for floats)."""
    classes: Annotated[list[str], Field(max_length=65536)] = []
    """Class names by id; empty: background and foreground, or numbers."""

    _span = model_validator(mode="after")(require_span)

    @model_validator(mode="after")
    def _factory_goes_alone(self) -> "ForeignConfig":
        if self.factory and self.layout:
            raise ValueError("layout and factory exclude each other; give one of them")
        if not self.factory and (self.arguments or self.stride != "auto"):
            raise ValueError("arguments and stride belong to a factory; give model.factory too")
        if self.factory and self.color == "auto":
            raise ValueError(
                "color is 'auto', but a factory does not tell its channels; give model.color: "
                "gray, rgb or their number"
            )
        return self


class ImportConfig(Section):
    """Everything that ``unet-jobs import-weights`` needs."""

    source: Uri
    """The file to read: ``.safetensors``, or a ``state_dict`` that ``torch.save`` wrote."""
    destination: Uri
    """The checkpoint to write, ``.safetensors``."""
    model: ForeignConfig = ForeignConfig()
    storage: StorageConfig = StorageConfig()

    @field_validator("destination")
    @classmethod
    def _is_safetensors(cls, uri: str) -> str:
        if not uri.endswith(".safetensors"):
            raise ValueError(f"got {uri!r}, but checkpoints end with .safetensors")
        return uri


def load(kind: type[ConfigT], path: str, overrides: list[str]) -> ConfigT:
    """Read a TOML file, apply ``section.key=value`` overrides and check the whole.

    Raises ConfigError that lists every problem, one a line, each with where, what and what is
    allowed.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return build(kind, table, overrides, source=path)


def build(
    kind: type[ConfigT], table: dict[str, Any], overrides: list[str], source: str = "config"
) -> ConfigT:
    """Apply overrides to a table and check it, as ``load`` does for a file."""
    table = copy.deepcopy(table)
    for path, value in override_values(overrides).items():
        _set(table, path, value)
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        problems = sentences(kind, error)
        raise ConfigError("\n".join(f"{source}: {p}" for p in problems)) from error


def override_values(overrides: list[str]) -> dict[str, Any]:
    """``key=value`` words as a table; a value is TOML, or else a plain string."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{override}: not an option; write key=value")
        try:
            values[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = text
    return values


def _set(table: dict[str, Any], path: str, value: Any) -> None:
    """Put a value where ``section.key`` says."""
    *sections, key = path.split(".")
    if not sections or not all((*sections, key)):
        raise ConfigError(f"{path}={value}: not an override; write section.key=value")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{path}={value}: {section} is a value, not a section")
    table[key] = value


def has_credentials(uri: str) -> bool:
    """Whether a URI names a user before its host or bucket, also where a slash in the password cuts
    it short; ``abfs://container@account`` and access points (``s3://arn:…``) are none.
    """
    for protocol, authority in AUTHORITY.findall(uri):
        user, at, _ = authority.rpartition("@")
        if protocol in ("file", "local", "memory") or authority.startswith("arn:"):
            continue
        if ":" in (user if at else authority) or (at and protocol != "abfs"):
            return True
    return False


def is_remote(uri: str) -> bool:
    """Whether a URI is no path of a file system."""
    return "://" in uri and not uri.startswith(("file://", "local://"))


def plain(uri: str) -> str:
    """A local URI as a path; any other as it is."""
    return uri.removeprefix("file://").removeprefix("local://")


def absolute(uri: str) -> str:
    """A local URI as a path from the root; any other as it is."""
    return uri if is_remote(uri) else os.path.abspath(os.path.expanduser(plain(uri)))


def refuse_nesting(name: str, uri: str, read: dict[str, str]) -> None:
    """Output inside input would be read as input on the next run, and the other way round.

    ``read``: by the keys of a config. Raises ConfigError.
    """
    for key, other in read.items():
        path, root = (
            Path(p) if is_remote(p) else Path(plain(p)).expanduser().resolve() for p in (uri, other)
        )
        if path == root or root in path.parents or path in root.parents:
            raise ConfigError(f"{name} ({uri}) and {key} ({other}) must not contain each other")
