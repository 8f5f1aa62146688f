"""The config of ``unet-jobs predict``."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    model_validator,
)

from unet_core.config.sections import (
    Auto,
    Count,
    FactoryName,
    FolderConfig,
    InputConfig,
    Section,
    ShareConfig,
    StorageConfig,
)
from unet_core.config.uris import UriOrNone, refuse_nesting

ENOUGH_IMAGES = 1000
"""Before so many, the share of failed ones says nothing, except at the end."""


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
        refuse_nesting("output.uri", self.output.uri, self.read_paths)
        return self

    @property
    def read_paths(self) -> dict[str, str]:
        """Where data is read: URIs by their keys."""
        return self.input.paths("input")
