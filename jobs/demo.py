"""``unet-jobs demo``: sample data, and the config of a run on two actors of a local Ray cluster."""

from pathlib import Path

from unet_core.synthetic import write_webdataset

IMAGES, SHARDS = 64, 8

CONFIG = """\
[input]
uri = "{folder}/images"
masks = "mask.png"            # each KEY.png has its truth in KEY.mask.png

[model]
checkpoint = "builtin:nuclei"

[output]
uri = "{folder}/run"

[workers]
count = 2
cpus = 1
"""


def write_data(folder: Path) -> Path:
    """The sample images, and the config that segments them."""
    write_webdataset(folder / "images", IMAGES, SHARDS)
    config = folder / "predict.toml"
    config.write_text(CONFIG.format(folder=folder.as_posix()), encoding="utf-8")
    return config
