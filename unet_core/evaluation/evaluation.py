"""Evaluations: the masks of a run compared with truth, in parts with the rows of its metrics."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_core.arrays import Array
from unet_core.concurrency import map_in_order
from unet_core.errors import ImageError, ShardError
from unet_core.evaluation.aggregate import Aggregate, Row
from unet_core.evaluation.other_run import OtherRun
from unet_core.evaluation.truth import BesideImages, Found, LabelImages
from unet_core.images.decoder import check_truth_shape
from unet_core.images.raster import Raster
from unet_core.inputs.shards import Shard
from unet_core.metrics import confusion, truth_columns
from unet_core.runs.parts import current_ids, metrics_name, metrics_part, read_metrics
from unet_core.runs.reader import StoredMask, open_masks
from unet_core.runs.run_folder import Identity, RunFolder
from unet_core.runs.schema import EVALUATION
from unet_core.storage.store import Store

FOLDER = "evaluation"
TRUTH_JSON = "truth.json"
"""The record of the evaluation; published first and once."""
EVALUATION_JSON = "evaluation.json"
"""Its scores; published last."""
WITHOUT_TRUTH: Row = dict.fromkeys(("tp", "fp", "fn", "confusion", "ignored_pixels", "truth"))
NO_ERROR: Row = {"error_code": None, "error_message": None}
OWNERS = pa.schema([("truth", pa.string()), ("image_id", pa.string())])

Truth = LabelImages | BesideImages | OtherRun
"""Finds the truth of images; travels to the nodes."""


@dataclass(frozen=True)
class Evaluation:
    """A folder ``evaluation/<name>`` of a run, with a part for each shard."""

    run: Store
    store: Store
    truth: Truth
    classes: int
    ignore_index: int
    identity: Identity
    first_foreground: int
    """Lowest id of a foreground class."""

    def begin(self) -> None:
        """Take the folder. Raises RunMismatchError if it holds another evaluation."""
        RunFolder(self.store, TRUTH_JSON, "evaluation").create_or_join(
            self.identity, advice="give another --name, or none"
        )

    def done(self) -> set[str]:
        """Shards whose part is of the masks that the run has now."""
        return current_ids(self.run, self.store, "metrics")

    def do(self, shard: Shard) -> int:
        """Compare the masks of one shard with their truth, and publish its part."""
        table, footer = read_metrics(self.run, shard.shard_id)
        rows = table.drop_columns([*{*WITHOUT_TRUTH} & {*table.column_names}]).to_pylist()
        judged = []
        with open_masks(self.run, shard.shard_id) as masks:
            for row, found in zip(rows, self.truth.of(shard, rows), strict=True):
                mask = masks.mask(row["image_id"]) if row["status"] == "ok" else None
                if row["status"] == "ok" and mask is None:
                    raise ShardError(
                        f"the run lacks the mask of {row['image_id']}; unet-jobs verify tells more"
                    )
                judged.append(
                    row | WITHOUT_TRUTH | {"truth": found.name} | self._judge(row, mask, found)
                )
        self.store.publish(metrics_name(shard.shard_id), metrics_part(judged, footer, EVALUATION))
        return len(rows)

    def _judge(self, row: Row, mask: StoredMask | None, found: Found) -> Row:
        """Columns of a row that compare it with its truth; a failed image keeps its reason."""
        if mask is None:
            return {}
        labels = check_truth_shape(found.labels, (mask.height, mask.width))
        if labels is None:
            return NO_ERROR
        try:
            if isinstance(labels, ImageError):
                raise labels
            valid = sum(row["class_pixels"])
            return NO_ERROR | truth_columns(self._confusion(mask, labels), valid)
        except ImageError as failure:
            return {"error_code": failure.code, "error_message": str(failure)}

    def _confusion(self, mask: StoredMask, truth: Raster) -> Array:
        return sum(
            (
                confusion(truth.read(box).pixels_CHW[0], read(), self.classes, self.ignore_index)
                for box, read in mask.windows.items()
            ),
            np.zeros((self.classes, self.classes), np.int64),
        )

    def aggregate(self, shard_ids: set[str]) -> Aggregate:
        """Add up their parts. Raises ConfigError if two images have one label image."""
        of_runs = isinstance(self.truth, OtherRun)

        def read(shard_id: str) -> tuple[Aggregate, pa.Table]:
            rows, footer = read_metrics(self.store, shard_id)
            owners = rows.filter(pc.field("truth").is_valid()).select(["truth", "image_id"])
            first = owners.group_by("truth").aggregate([("image_id", "min")])
            seen = int(footer["images_seen"])
            return Aggregate.of_rows(rows, seen, of_runs, self.first_foreground), first

        total, owners = Aggregate(), [OWNERS.empty_table()]
        for aggregate, first in map_in_order(read, sorted(shard_ids)):
            total += aggregate
            owners.append(first.rename_columns(OWNERS.names))
        if isinstance(self.truth, LabelImages):
            self.truth.require_distinct(pa.concat_tables(owners))
        return total
