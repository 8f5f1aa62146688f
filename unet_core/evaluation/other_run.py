"""Masks of another run as truth."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from unet_core.concurrency import map_in_order
from unet_core.errors import ImageError, ShardError
from unet_core.evaluation.aggregate import Images, Row
from unet_core.evaluation.truth import Found
from unet_core.images.raster import Raster, Window, WindowRaster
from unet_core.inputs.shards import Shard
from unet_core.runs.parts import read_columns
from unet_core.runs.reader import Results, StoredMask, open_masks
from unet_core.storage.store import Store

IDS = pa.schema([("image_id", pa.string()), ("shard_id", pa.string())])


@dataclass(frozen=True)
class OtherRun:
    """The masks of another run; ``name`` of what is found is the image's status there."""

    store: Store
    shards: dict[str, tuple[str, ...]]
    """Shards of the other run that hold the images of a shard, if not the one of the same id."""

    def of(self, shard: Shard, rows: list[Row]) -> Iterator[Found]:
        """Find each row's mask by image id; one masks part is open at a time."""
        there: dict[str, tuple[str, Row]] = {}
        for shard_id in self.shards.get(shard.shard_id, (shard.shard_id,)):
            rows_there = read_columns(self.store, shard_id, "image_id", "status", "error_message")
            for row in rows_there.to_pylist():
                if row["image_id"] not in there or row["status"] == "ok":
                    there[row["image_id"]] = shard_id, row
        with ExitStack() as stack:
            opened, masks = "", None
            for row in rows:
                shard_id, other = there.get(row["image_id"], ("", None))
                if other is None:
                    yield Found()
                elif other["status"] != "ok":
                    yield Found(
                        "failed",
                        ImageError("truth", f"it failed there: {other['error_message']}"),
                    )
                elif row["status"] != "ok":
                    yield Found("ok")
                else:
                    if masks is None or shard_id != opened:
                        stack.close()
                        masks = stack.enter_context(open_masks(self.store, shard_id))
                        opened = shard_id
                    mask = masks.mask(row["image_id"])
                    if mask is None:
                        raise ShardError(
                            f"{self.store.uri()} lacks the mask of {row['image_id']}; unet-jobs "
                            "verify tells more"
                        )
                    yield Found("ok", _raster(mask))

    @classmethod
    def joined(cls, mine: Results, other: Results) -> "tuple[OtherRun, Images]":
        """Join two runs: the masks of ``other`` for the images of ``mine``, and the images that
        only ``other`` has. Shards of one id have the same images; the rest is joined by image id.
        """
        here, there = ({shard.shard_id for shard in results.shards()} for results in (mine, other))
        ours, theirs = _ids(mine.run.store, here - there), _ids(other.run.store, there - here)
        shards = {shard_id: set[str]() for shard_id in here - there}
        pairs = ours.join(theirs, "image_id", join_type="inner", right_suffix="_there")
        for pair in pairs.group_by(["shard_id", "shard_id_there"]).aggregate([]).to_pylist():
            shards[pair["shard_id"]].add(pair["shard_id_there"])
        only = theirs.join(ours, "image_id", join_type="left anti")["image_id"].to_pylist()
        found = cls(other.run.store, {i: tuple(sorted(ids)) for i, ids in shards.items()})
        return found, Images.of(sorted(only))


def _ids(store: Store, shard_ids: set[str]) -> pa.Table:
    def read(shard_id: str) -> pa.Table:
        ids = read_columns(store, shard_id, "image_id")
        return ids.append_column("shard_id", pa.repeat(shard_id, ids.num_rows))

    return pa.concat_tables([IDS.empty_table(), *map_in_order(read, sorted(shard_ids))])


def _raster(mask: StoredMask) -> Raster:
    """Class ids of a mask as a raster: a mask window is decoded whole."""
    side = next(iter(mask.windows)).shape
    return WindowRaster(
        (mask.height, mask.width), 1, np.dtype(np.uint16), side, 0,
        lambda window: Window(mask.cut(window)[None]),
    )  # fmt: skip
