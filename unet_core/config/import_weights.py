"""The config of ``unet-jobs import-weights``."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from unet_core.config.normalization import NormalizationSection
from unet_core.config.sections import (
    Auto,
    Background,
    Count,
    FactoryName,
    Section,
    StorageConfig,
)
from unet_core.config.uris import Uri


class ForeignConfig(NormalizationSection):
    """What weights from elsewhere do not say of themselves."""

    layout: str = ""
    """Whose key names they have; empty: found by the keys."""
    factory: FactoryName = ""
    """``package.module:function`` that makes the network; empty: a U-Net of a known layout."""
    arguments: dict[str, Any] = Field(default={})
    """Keyword arguments of the factory."""
    stride: Auto | Count = "auto"
    """Pixels by which the input of the factory's network must move for its output to move along;
    ``auto``: found by trying."""
    color: Auto | Literal["gray", "rgb"] | Annotated[int, Field(strict=True, ge=1)] = "auto"
    """What images are converted to; a number: that many channels as they are; ``auto``: by the
    network's input channels, which a factory does not tell."""
    normalization: Literal["percentile", "range", "zscore", "standard"] = "range"
    classes: list[str] = Field(default=[], max_length=65535)
    """Class names by id; empty: background and foreground, or numbers."""
    background: Background = "first"
    """``first``: class 0 is background; ``none``: it is a class like the others."""

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
