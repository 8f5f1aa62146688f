"""The config of ``unet-jobs train``. Imports neither torch nor Ray."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from unet_core.config.normalization import NormalizationSection
from unet_core.config.presets import Factory, NetworkSpec, UNetSpec, channels_of, preset
from unet_core.config.sections import (
    Auto,
    Background,
    Count,
    FactoryName,
    FolderConfig,
    InputConfig,
    Number,
    Section,
    ShareConfig,
    StorageConfig,
)
from unet_core.config.uris import UriOrNone, refuse_nesting
from unet_core.tiling.geometry import Sides

Share = Annotated[float, Field(ge=0, lt=1)]
CHECKPOINT_DECIDES = (
    "preset", "width", "depth", "arguments", "color", "normalization", "low", "high", "mean", "std",
)  # fmt: skip
"""Keys of ``[model]`` that are refused beside ``checkpoint``, whose header holds their values."""


class LabelledConfig(InputConfig):
    """Images with truth; ``masks`` is required here."""

    statistics: Literal["image"] = "image"
    """Training normalizes each image by itself; fixed limits are ``model.normalization = "range"``
    with ``model.low`` and ``model.high``."""
    low: None = None
    high: None = None
    instances: bool = False
    """Mask values are object ids: 0 is background, every other value an object of class 1."""
    on_missing_mask: Literal["skip", "background", "refuse"] = "refuse"
    """An image without a mask: name it before the first step and stop, leave it out, or take it as
    all class 0."""


class DataConfig(Section):
    """Images with truth, for training and for validation."""

    train: LabelledConfig
    val: LabelledConfig | None = None
    """If absent, ``val_fraction`` of ``train`` is set aside."""
    val_fraction: Share = 0.1
    """Share of ``train`` used for validation, chosen by a hash of the image id."""

    @property
    def parts(self) -> dict[str, LabelledConfig]:
        """The configured inputs by key: ``train``, and ``val`` if it is given."""
        return {"train": self.train} | ({"val": self.val} if self.val is not None else {})

    @model_validator(mode="after")
    def _truth_is_named(self) -> "DataConfig":
        for name, part in self.parts.items():
            if not part.masks:
                raise ValueError(f"{name}.masks is empty, but training needs the truth")
        return self


class NetworkConfig(NormalizationSection):
    """The network to train."""

    checkpoint: UriOrNone = ""
    """Initial weights; the file decides network, preprocessing and (unless given here) classes."""
    preset: str = "padded"
    """Name of a U-Net variant; ``unet-jobs model`` lists all."""
    width: Annotated[int, Field(strict=True, ge=1, le=1024)] = 64
    """Channels of the first level; each pool doubles them."""
    depth: Auto | Annotated[int, Field(strict=True, ge=1, le=8)] = "auto"
    """Number of pools; ``auto``: that of the preset."""
    factory: FactoryName = ""
    """``package.module:function`` that makes another network instead: NCHW to logits NKHW."""
    arguments: dict[str, Any] = Field(default={})
    """Keyword arguments of ``factory``; the string ``null`` is None, which TOML cannot write."""
    color: Literal["gray", "rgb"] | Annotated[int, Field(strict=True, ge=1)] = "gray"
    """Color space that images are converted to; a number: that many channels, unconverted."""
    normalization: Literal["percentile", "range", "zscore", "standard"] = "percentile"
    classes: list[str] = Field(default=["background", "foreground"], min_length=2, max_length=256)
    """Class names by id; two classes make a one-logit network."""
    background: Background = "first"
    """``first``: class 0 is background; ``none``: it counts like the others in the losses over
    crops, in ``train.best``, and in the scores of images. The checkpoint keeps it."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"

    @property
    def spec(self) -> NetworkSpec:
        """The network to build if there is no checkpoint; two classes make one logit."""
        channels = channels_of(self.color)
        logits = 1 if len(self.classes) == 2 else len(self.classes)
        if self.factory:
            return Factory(self.factory, self.arguments, channels, logits)
        depth = {} if self.depth == "auto" else {"depth": self.depth}
        return preset(self.preset, in_channels=channels, classes=logits, width=self.width, **depth)

    @model_validator(mode="after")
    def _network_exists(self) -> "NetworkConfig":
        given = [key for key in CHECKPOINT_DECIDES if key in self.model_fields_set]
        if self.checkpoint and given:
            raise ValueError(
                f"{given[0]} and checkpoint exclude each other: the checkpoint brings its own"
            )
        if self.arguments and not self.factory:
            raise ValueError("arguments belong to a factory; give model.factory too")
        assert self.spec  # raises ConfigError for what no network can be
        return self


class FitConfig(Section):
    """The training loop."""

    epochs: Count = 40
    """Passes over the training images."""
    steps: Count | None = None
    """Optimizer steps, instead of ``epochs``."""
    batch: Count = 8
    """Crops per step, over all ranks."""
    accumulate: Count = 1
    """Forward and backward passes per step (gradient accumulation), to save memory."""
    crop: Annotated[int, Field(strict=True, ge=2)] = 192
    """Side of the crop in pixels of the mask; networks without padding get a margin around it."""
    crops_per_image: Count = 1
    """Crops taken from each image in an epoch."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-3
    """Learning rate after the warm-up."""
    momentum: Share = 0.9
    """Momentum of ``sgd``."""
    weight_decay: Number = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate: to zero at the end, or none."""
    warmup: Share = 0.05
    """Share of the steps in which the learning rate first rises linearly."""
    clip_norm: Number = 1.0
    """Largest norm of the gradient over all weights, to which it is clipped; 0: no limit."""
    ema: Share = 0.0
    """Decay of an exponential moving average of the weights, which is then validated and published;
    0: none."""
    freeze_norm: bool = False
    """Leave the statistics and weights of BatchNorm as they are."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the activations (autocast); ``auto``: bfloat16 on a GPU that supports it."""
    compile: bool = False
    """Compile the network with torch.compile first: takes minutes, makes steps faster."""
    best: Literal["iou", "dice", "accuracy"] = "iou"
    """Validation metric that selects the best weights: mean IoU or Dice of the foreground classes
    (see ``model.background``), or the share of correct pixels."""
    checkpoint_minutes: Number = 10.0
    """Minutes between checkpoints within an epoch, beside the one at its end; 0: none within."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _one_length(self) -> "FitConfig":
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError("epochs and steps exclude each other; give one of them")
        return self


class LossConfig(Section):
    """A weighted sum of losses; 0 leaves one out. Ignored pixels count in none."""

    cross_entropy: Number = 1.0
    """Cross-entropy of the softmax, or of the sigmoid if there is one logit."""
    bce: Number = 0.0
    """Binary cross-entropy of each class against all others."""
    focal: Number = 0.0
    """Cross-entropy times (1 − p)^``focal_gamma`` (Lin et al. 2017)."""
    dice: Number = 1.0
    """1 − Dice of the foreground classes of each crop."""
    jaccard: Number = 0.0
    """1 − IoU of the foreground classes of each crop."""
    tversky: Number = 0.0
    """1 − Tversky index (Salehi et al. 2017), with the two weights below."""
    focal_gamma: Number = 2.0
    tversky_alpha: Number = 0.3
    """Weight of false positives."""
    tversky_beta: Number = 0.7
    """Weight of false negatives."""
    class_weights: Literal["none", "balanced"] | list[Number] = "none"
    """Weights of the pixels of each class in the losses over pixels (cross-entropy, bce, focal);
    ``balanced``: inverse class frequencies, with a mean of 1 over all pixels."""
    boundary: Number = 0.0
    """w0 of the paper's weight map (10 there), added to the class weights: pixels between objects
    that lie close together count more."""
    boundary_sigma: Annotated[float, Field(gt=0, le=50)] = 5.0
    """σ of the weight map in pixels."""

    @model_validator(mode="after")
    def _something_is_minimised(self) -> "LossConfig":
        names = ("cross_entropy", "bce", "focal", "dice", "jaccard", "tversky")
        if not any(getattr(self, name) for name in names):
            raise ValueError(f"every loss has weight 0; give one of {', '.join(names)} a weight")
        return self


class AugmentConfig(Section):
    """Random augmentation of each crop; values are limits, 0 (or 1 for ratios) is off."""

    flips: bool = True
    """Mirror along each axis, in half of the crops."""
    quarter_turns: bool = True
    """Rotate by 0, 90, 180 or 270 degrees."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 15.0
    """Largest rotation in degrees, in either direction."""
    scale: Annotated[float, Field(ge=1, le=4)] = 1.25
    """Largest ratio by which objects are enlarged or reduced."""
    elastic: Annotated[float, Field(ge=0, le=100)] = 0.0
    """The paper's deformation: σ in pixels (10 there) of random displacements on a 3×3 grid over
    the crop, interpolated bicubically."""
    contrast: Share = 0.3
    """Gray values are multiplied by a factor within 1 ± this."""
    brightness: Number = 0.1
    """A value within ± this is added to the normalized image."""
    gamma: Annotated[float, Field(ge=1, le=4)] = 1.4
    """Normalized values are raised to an exponent between 1/this and this."""
    color: Share = 0.0
    """Like ``contrast``, drawn for each channel separately."""
    noise: Number = 0.08
    """Largest σ of Gaussian noise, in half of the crops."""


class TrainWorkersConfig(ShareConfig):
    """The ranks of the DDP group; not part of a training's identity."""

    count: Auto | Literal["inline"] | Count | tuple[Count, Count] = "auto"
    """Number of ranks, or the fewest and the most if the cluster decides. ``inline``: this
    process, no Ray. ``auto``: one per GPU of the cluster, or inline where there is at most one GPU
    and no cluster."""

    @field_validator("count")
    @classmethod
    def _fewest_first(cls, count: Any) -> Any:
        if isinstance(count, tuple) and count[0] > count[1]:
            raise ValueError(f"got {list(count)}, but the fewest ranks come first")
        return count

    max_failures: Annotated[int, Field(strict=True, ge=0)] = 10
    """Number of times that ranks may die; each time all restart at the newest checkpoint."""


class TrainConfig(Section):
    """Everything that ``unet-jobs train`` needs."""

    data: DataConfig
    model: NetworkConfig = NetworkConfig()
    train: FitConfig = FitConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    output: FolderConfig
    workers: TrainWorkersConfig = TrainWorkersConfig()
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _crop_fits_network(self) -> "TrainConfig":
        spec, crop = self.model.spec, self.train.crop
        if isinstance(spec, UNetSpec) and not self.model.checkpoint:
            lost = 2 * spec.margin
            smallest = spec.sides.at_least(2 * spec.stride + lost)  # BatchNorm needs several values
            crops = Sides(smallest - lost, spec.sides.step)
            if crop not in crops:
                raise ValueError(
                    f"train.crop is {crop}, but {self.model.preset} cannot give that; "
                    f"{crops.near(crop)}"
                )
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "TrainConfig":
        classes, train = len(self.model.classes), self.train
        if classes > 2 and any(part.instances for part in self.data.parts.values()):
            raise ValueError(
                f"instances knows one class of objects, but model.classes names {classes}"
            )
        if train.accumulate > train.batch:
            raise ValueError(
                f"train.accumulate is {train.accumulate}, but a batch has only {train.batch} crops"
            )
        refuse_nesting("output.uri", self.output.uri, self.read_paths)
        return self

    @property
    def read_paths(self) -> dict[str, str]:
        """URIs of images and masks by config key."""
        return {
            key: uri
            for name, part in self.data.parts.items()
            for key, uri in part.paths(f"data.{name}").items()
        }
