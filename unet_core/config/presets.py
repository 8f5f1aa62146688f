"""The networks as data: what a U-Net is made of, the named choices, and the sizes they take."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from pydantic import ConfigDict

from unet_core.errors import ConfigError
from unet_core.tiling.geometry import Sides


@dataclass(frozen=True)
class UNetSpec:
    """Everything that decides a U-Net's shape; two equal specs take the same weights.

    A level is a block of two 3×3 convolutions. Defaults are those of ``padded``.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # where one is read

    in_channels: int = 3
    classes: int = 1
    """Logits per pixel; 1 means one sigmoid for two classes."""
    width: int = 64
    """Channels of the first level; each pool doubles them."""
    depth: int = 4
    """2×2 max pools."""
    padding: Literal["same", "valid"] = "same"
    """3×3 convolutions pad with zeros, or lose their border."""
    dilation: int = 1
    """Of the encoder's convolutions."""
    norm: Literal["none", "before_relu", "after_relu"] = "before_relu"
    """Where BatchNorm follows each 3×3 convolution."""
    bias: bool = True
    """Of the 3×3 convolutions."""
    ceil_pool: bool = False
    """Pools keep a last odd row and column."""
    bottom: Literal["double", "same"] = "double"
    """Channels below the last pool; ``same`` goes with ``up = "bilinear"``."""
    up: Literal["transpose", "transpose3", "bilinear", "bilinear_conv"] = "transpose"
    """Transposed convolution 2×2 or 3×3, or bilinear ×2 with align_corners, alone or with a 1×1
    convolution; all but ``bilinear`` halve the channels."""
    up_relu: bool = False
    """ReLU after the up-sampling."""
    decoder_middle: Literal["narrow", "wide"] = "narrow"
    """Channels between a decoder block's convolutions, where ``up = "bilinear"``: those that leave
    the block, or half of those that enter."""
    skip: Literal["encoded", "pooled"] = "encoded"
    """What the skip carries: the block's output, or what the pool makes of it."""
    join: Literal["equal", "crop", "crop_even", "pad", "resize"] = "equal"
    """Where sizes differ: the skip is cropped at its centre (offset rounded down, or half to
    even), the decoder is padded with zeros, or the skip is resized bilinearly."""
    concat: Literal["decoder_skip", "skip_decoder"] = "decoder_skip"
    """Order of the channels where the skip joins."""
    dropout: Literal["none", "units", "channels"] = "none"
    """0.5 after the last two blocks of the contracting path."""
    head: Literal["1x1", "3x3", "3x3_relu_norm"] = "1x1"
    """The last convolution; ``3x3_relu_norm`` puts ReLU and BatchNorm behind it."""
    resize_logits: bool = False
    """Logits are resized bilinearly to the input's size."""
    init: Literal["torch", "he", "xavier"] = "torch"
    """Initial weights of the 3×3 convolutions: N(0, √(2/fan_in)), or Xavier's normal."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(UNetSpec).items():
            allowed, given = get_args(kind), getattr(self, name)
            if allowed and given not in allowed:
                raise ConfigError(f"model: {name} is {given!r}, allowed: {', '.join(allowed)}")
        if (self.up == "bilinear") != (self.bottom == "same"):
            raise ConfigError("model: up = 'bilinear' and bottom = 'same' go together")
        if min(self.in_channels, self.classes, self.width, self.depth, self.dilation) < 1:
            raise ConfigError(
                "model: in_channels, classes, width, depth and dilation must be 1 or more"
            )

    @property
    def stride(self) -> int:
        """Pixels by which the input must move for the output to move along."""
        return int(2**self.depth)

    @property
    def moves_with_input(self) -> bool:
        """Whether a shift of the input by a stride shifts the output; resizing sees the window."""
        return not (self.up.startswith("bilinear") or self.join == "resize" or self.resize_logits)

    def output_side(self, side: int) -> int | None:
        """Logits along an axis of ``side`` pixels; None where the network cannot run."""
        lost = 4 if self.padding == "valid" else 0
        skips, pooled = list[int](), side
        for _ in range(self.depth):
            encoded = pooled - lost * self.dilation
            pooled = -(-encoded // 2) if self.ceil_pool else encoded // 2
            if pooled < 1 or (self.join.startswith("crop") and encoded % 2):
                return None
            skips.append(encoded)
        at = pooled - lost
        for encoded in reversed(skips):
            at *= 2
            if at < 1 or (self.join == "equal" and at != encoded):
                return None
            at = (encoded if self.join == "pad" else at) - lost
        if at < 1:
            return None
        return side if self.resize_logits else at

    @property
    def sides(self) -> Sides:
        """The image sides that the network takes."""
        legal = (n for n in range(1, 2**15) if self.output_side(n) is not None)
        smallest, following = next(legal, None), next(legal, None)
        if smallest is None or following is None:
            raise ConfigError("model: these options fit together at no image size")
        return Sides(smallest, following - smallest)

    @property
    def margin(self) -> int:
        """Pixels that valid convolutions lose on each side."""
        side = self.sides.smallest
        return (side - (self.output_side(side) or 0)) // 2


@dataclass(frozen=True)
class Factory:
    """A network of somebody else: a function that makes it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    factory: str
    """``package.module:function``."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""
    in_channels: int = 3
    classes: int = 1


NetworkSpec = UNetSpec | Factory

COLORS = {"gray": 1, "rgb": 3}


def channels_of(color: str | int) -> int:
    """Channels of an image in the colours that a network wants: by name, or that many."""
    return color if isinstance(color, int) else COLORS[color]


_TUTORIAL = UNetSpec(join="pad", concat="skip_decoder", dropout="channels", init="xavier")
_CONCAT = UNetSpec(classes=10, padding="valid", concat="skip_decoder")

PRESETS = {
    "padded": UNetSpec(),
    "bilinear": replace(_TUTORIAL, up="bilinear_conv", up_relu=True),
    "transpose": _TUTORIAL,
    "paper": UNetSpec(
        in_channels=1, classes=2, padding="valid", norm="none", join="crop",
        concat="skip_decoder", dropout="units", init="he",
    ),
    "valid3": UNetSpec(
        in_channels=1, classes=2, depth=3, padding="valid", norm="after_relu", up="transpose3",
        join="crop", head="3x3_relu_norm",
    ),
    "dilated": UNetSpec(
        classes=2, padding="valid", dilation=2, norm="none", ceil_pool=True, up_relu=True,
        skip="pooled", join="resize", dropout="units", resize_logits=True,
    ),
    "concat-crop": replace(_CONCAT, join="crop_even"),
    "concat-pad": replace(_CONCAT, join="pad"),
    "concat-same": replace(_CONCAT, padding="same"),
    "plain": UNetSpec(classes=10, norm="none", concat="skip_decoder"),
}  # fmt: skip


def preset(name: str, **options: Any) -> UNetSpec:
    """A preset with some of its fields changed; raises ConfigError for an unknown name or field."""
    if name not in PRESETS:
        raise ConfigError(f"model.preset: got {name!r}, allowed: {', '.join(PRESETS)}")
    known = [f.name for f in fields(UNetSpec)]
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"model: {unknown[0]} is no option; allowed: {', '.join(known)}")
    return replace(PRESETS[name], **options)
