"""``unet-jobs demo``: sample data, a run on a local Ray cluster with two actors, and a picture."""

from dataclasses import dataclass
from pathlib import Path

from jobs.predict import Outcome, predict
from unet_core.config import PredictConfig, load
from unet_core.contact_sheet import Entry, contact_sheet, stretch
from unet_core.images.codec import decode_image, decode_labels
from unet_core.images.tiff import Rules
from unet_core.inputs.formats import list_shards, open_source, read_shard
from unet_core.metrics import Scores
from unet_core.parts import read_metrics
from unet_core.results import open_run
from unet_core.synthetic import write_webdataset

IMAGES, SHARDS, SHOWN = 64, 8, 8

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


@dataclass(frozen=True)
class Demo:
    """What the demo left."""

    config: Path
    outcome: Outcome
    sheet: Path


def write_data(folder: Path) -> Path:
    """The sample images, and the config that segments them."""
    write_webdataset(folder / "images", IMAGES, SHARDS)
    config = folder / "predict.toml"
    config.write_text(CONFIG.format(folder=folder.as_posix()), encoding="utf-8")
    return config


def demo(folder: Path) -> Demo:
    """Write the data, run the job, draw the sheet."""
    path = write_data(folder)
    config = load(PredictConfig, str(path), [])
    outcome = predict(config)
    sheet = folder / "contact_sheet.png"
    sheet.write_bytes(draw_sheet(config, outcome))
    return Demo(path, outcome, sheet)


def draw_sheet(config: PredictConfig, outcome: Outcome) -> bytes:
    """A contact sheet of the run's first shard."""
    run, record = outcome.run, outcome.run.record
    assert record is not None
    source = open_source(config.input, config.storage)
    shard = next(iter(list_shards(source)))
    rows, _ = read_metrics(run.store, shard.shard_id)
    scores = {r["image_id"]: Scores(r["tp"][1], r["fp"][1], r["fn"][1]) for r in rows.to_pylist()}
    entries = []
    for sample in list(read_shard(source, shard))[:SHOWN]:
        mask_HW, iou = open_run(run.uri).mask(sample.image_id), scores[sample.image_id].iou
        assert sample.read_mask is not None
        truth_HW = decode_labels(sample.read_mask(), Rules(config.input.max_pixels), {}, 2, 255)
        image_HW = decode_image(sample.read(), config.input.max_pixels).pixels_HWC[..., 0]
        caption = f"{sample.image_id}   {mask_HW.shape[0]} x {mask_HW.shape[1]}   IoU {iou:.3f}"
        entries.append(Entry(caption, stretch(image_HW), truth_HW, mask_HW))
    return contact_sheet(entries, record.palette)
