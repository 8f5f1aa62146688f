"""The networks as data: what a U-Net is made of, and the named choices."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from unet_core.errors import ConfigError


@dataclass(frozen=True)
class UNetSpec:
    """Everything that decides a U-Net's shape; two equal specs take the same weights."""

    in_channels: int = 3
    classes: int = 1
    """Logits per pixel; 1 means one sigmoid for two classes."""
    width: int = 64
    """Channels of the first level; each pool doubles them."""
    depth: int = 4
    """2×2 max pools."""
    norm: bool = True
    """BatchNorm between each 3×3 convolution and its ReLU."""
    concat: Literal["decoder_skip", "skip_decoder"] = "decoder_skip"
    """Order of the channels where the skip joins."""

    @property
    def stride(self) -> int:
        """Image sides are multiples of this many pixels."""
        return int(2**self.depth)


PRESETS = {
    "padded": UNetSpec(),
    "plain": UNetSpec(classes=10, norm=False, concat="skip_decoder"),
}


def preset(name: str, **options: Any) -> UNetSpec:
    """A preset with some of its fields changed; raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"model.preset: got {name!r}, allowed: {', '.join(PRESETS)}")
    return replace(PRESETS[name], **options)
