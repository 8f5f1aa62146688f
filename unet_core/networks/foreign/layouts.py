"""Key tables of published U-Nets, by which their weights are recognised and renamed.

A layout holds the fixed properties of a network and its name for each module of ``UNet``. Depth,
width, channels, classes and biases are derived from the weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from unet_core.config.presets import PRESETS, UNetSpec


@dataclass(frozen=True)
class Layout:
    """Names of the modules of one published U-Net.

    Templates may use ``{level}`` (0 is the finest), ``{next}`` and ``{below}`` (level + 1 and + 2),
    ``{rise}`` and ``{step}`` (decoder blocks from the bottom, counted from 0 and from 1).
    """

    name: str
    spec: UNetSpec
    """Fixed properties; its depth, width, channels, classes and biases are ignored."""
    layers: str
    """Names inside a block: convolution and, if present, norm; twice."""
    encoder: str
    decoder: str
    head: str
    bottom: str = ""
    """Empty if it is named like one more encoder block."""
    up: str = ""
    """Empty if up-sampling has no weights."""
    finest_encoder: str = ""
    """Name of the finest encoder block if it differs from the others; so for the next two."""
    finest_decoder: str = ""
    deepest_up: str = ""
    head_norm: str = ""

    def names(self, depth: int, bias: bool) -> dict[str, str]:
        """Map ``UNet``'s tensor names to the source's; ``bias``: 3×3 convolutions have one."""
        found: dict[str, str] = {}
        for ours, theirs in self._modules(depth):
            has_bias = bias or not ours.endswith(("conv1", "conv2"))
            tensors = ["weight", "bias"] if has_bias else ["weight"]
            tensors += ["running_mean", "running_var"] if "norm" in ours else []
            found |= {f"{ours}.{tensor}": f"{theirs}.{tensor}" for tensor in tensors}
        return found

    def _modules(self, depth: int) -> Iterator[tuple[str, str]]:
        blocks = {"bottom": (self.bottom or self.encoder).format(level=depth, next=depth + 1)}
        others = {"head.conv": self.head, "head.norm": self.head_norm}
        for level in range(depth):
            rise = depth - 1 - level
            numbers = {"level": level, "next": level + 1, "below": level + 2, "rise": rise,
                       "step": rise + 1}  # fmt: skip
            encoder = self.finest_encoder if level == 0 else ""
            decoder = self.finest_decoder if level == 0 else ""
            up = self.deepest_up if rise == 0 else ""
            blocks[f"encoder.{level}"] = (encoder or self.encoder).format(**numbers)
            blocks[f"decoder.{level}"] = (decoder or self.decoder).format(**numbers)
            others[f"up.{level}.conv"] = (up or self.up).format(**numbers)
        layers = ("conv1", "norm1", "conv2", "norm2")[:: 2 if self.spec.norm == "none" else 1]
        for ours, theirs in blocks.items():
            for mine, layer in zip(layers, self.layers.split(), strict=True):
                yield f"{ours}.{mine}", f"{theirs}.{layer}"
        yield from ((ours, theirs) for ours, theirs in others.items() if theirs)


_MILESIAL = UNetSpec(bias=False, join="pad", concat="skip_decoder")
_JVANVUGT = UNetSpec(norm="none")
_JVANVUGT_VALID = replace(_JVANVUGT, padding="valid", join="crop")

_tutorial = Layout(
    "double_conv-transpose", PRESETS["transpose"], "0 1 3 4",
    finest_encoder="inc.conv.conv", encoder="down{level}.mpconv.1.conv", up="up{step}.up",
    decoder="up{step}.conv.conv", head="outc.conv",
)  # fmt: skip
_milesial = Layout(
    "milesial", _MILESIAL, "0 1 3 4",
    finest_encoder="inc.double_conv", encoder="down{level}.maxpool_conv.1.double_conv",
    up="up{step}.up", decoder="up{step}.conv.double_conv", head="outc.conv",
)  # fmt: skip
_concat = Layout(
    "concat-crop", PRESETS["concat-crop"], "0 1 3 4",
    finest_encoder="inc.conv", encoder="down{level}.maxpool_conv.1.conv", up="up{step}.up",
    decoder="up{step}.conv.conv", head="outc",
)  # fmt: skip
_jvanvugt = Layout(
    "jvanvugt-padded", _JVANVUGT, "0 2",
    encoder="down_path.{level}.block", up="up_path.{rise}.up",
    decoder="up_path.{rise}.conv_block.block", head="last",
)  # fmt: skip
_jvanvugt_norm = replace(_jvanvugt, spec=replace(_JVANVUGT, norm="after_relu"), layers="0 2 3 5")

LAYOUTS = (
    Layout(
        "nikhilroxtomar", PRESETS["padded"], "conv1 bn1 conv2 bn2",
        encoder="e{next}.conv", bottom="b", up="d{step}.up", decoder="d{step}.conv",
        head="outputs",
    ),
    _tutorial,
    replace(
        _tutorial, name="double_conv-bilinear", spec=PRESETS["bilinear"], up="up{step}.up.1",
    ),
    replace(
        _tutorial, name="early-pytorch-unet", up="",
        spec=UNetSpec(up="bilinear", bottom="same", join="pad", concat="skip_decoder"),
    ),
    _milesial,
    replace(
        _milesial, name="milesial-bilinear", up="",
        spec=replace(_MILESIAL, up="bilinear", bottom="same", decoder_middle="wide"),
    ),
    Layout(
        "deepresearch", PRESETS["valid3"], "0 2 3 5",
        encoder="conv_encode{next}", bottom="bottleneck", deepest_up="bottleneck.6",
        up="conv_decode{below}.6", decoder="conv_decode{next}", finest_decoder="final_layer",
        head="final_layer.6", head_norm="final_layer.8",
    ),
    Layout(
        "dilated", PRESETS["dilated"], "0 2",
        encoder="enc{next}.down", bottom="center", deepest_up="center.5", up="dec{below}.up.4",
        decoder="dec{next}.up", finest_decoder="dec1", head="final",
    ),
    _concat,
    replace(_concat, name="concat-pad", spec=PRESETS["concat-pad"]),
    replace(_concat, name="concat-same", spec=PRESETS["concat-same"]),
    Layout(
        "plain", PRESETS["plain"], "0 2",
        encoder="down_convolution_{next}", up="up_transpose_{step}",
        decoder="up_convolution_{step}", head="out",
    ),
    _jvanvugt,
    _jvanvugt_norm,
    replace(_jvanvugt, name="jvanvugt-valid", spec=_JVANVUGT_VALID),
    replace(
        _jvanvugt_norm, name="jvanvugt-valid", spec=replace(_JVANVUGT_VALID, norm="after_relu")
    ),
)  # fmt: skip
"""A name stands twice where its networks come with and without a norm."""
