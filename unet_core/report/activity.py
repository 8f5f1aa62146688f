"""How fast a run was and where its devices' time went, hour by hour, from ``timings/``.

Each committed attempt counts over its own time by the clock; attempts overlap, and time in which
there was none is cut out.
"""

import datetime
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_core.arrays import Array
from unet_core.report.charts import Plot, Series, lines, stack
from unet_core.runs.timings import DEVICE, Seconds

BINS = 60
CHUNK = 65536
LEAST_SHARDS = 6
PAUSE_S = 120.0
"""Time without an attempt is told if it is longer."""
SPENT = [f"{stage}_s" for stage in DEVICE.values()]
UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


class Activity:
    """The times of a run, of the rows in ``timings/``: at least one."""

    def __init__(self, table: pa.Table) -> None:
        ends_s = table["finished"].cast(pa.int64()).to_numpy() / 1e3
        begins_s = ends_s - np.maximum(table["whole_s"].to_numpy(), 1e-3)
        start_s, end_s, pauses = _without_pauses(begins_s, ends_s)
        self.began = datetime.datetime.fromtimestamp(float(begins_s.min()), datetime.UTC)
        self.ended: datetime.datetime = pc.max(table["finished"]).as_py()
        self.worked_s = float(end_s.max())
        """Seconds in which any attempt was under way."""
        self.pauses = len(pauses)
        self.images: int = pc.sum(table["images"]).as_py()
        self.images_per_s = self.images / self.worked_s
        self.megapixels_per_s = pc.sum(table["pixels"]).as_py() / 1e6 / self.worked_s
        self.shares = Seconds.of_table(table).shares
        self.actors = list(_actors(table))
        self.rate: Plot | None = None
        self.where: Plot | None = None
        """Both None for a few shards."""
        if table.num_rows >= LEAST_SHARDS:
            self.rate, self.where = _plots(table, start_s, end_s, self.worked_s, pauses)


def _without_pauses(start_s: Array, end_s: Array) -> tuple[Array, Array, list[float]]:
    """The same from 0, times in which nobody worked cut out; and where the long ones were."""
    order = np.argsort(start_s)
    busy_until = np.maximum.accumulate(end_s[order])
    gaps = start_s[order][1:] - busy_until[:-1]
    cut = np.flatnonzero(gaps > 0)
    ends = busy_until[:-1][cut]
    lengths = np.concatenate([[0.0], np.cumsum(gaps[cut])])

    def shifted(at_s: Array) -> Array:
        return at_s - start_s.min() - lengths[np.searchsorted(ends, at_s, side="left")]

    return shifted(start_s), shifted(end_s), shifted(ends[gaps[cut] > PAUSE_S]).tolist()


def _plots(
    table: pa.Table, start_s: Array, end_s: Array, worked_s: float, pauses: list[float]
) -> tuple[Plot | None, Plot]:
    edges = np.linspace(0, worked_s, min(BINS, 2 * table.num_rows) + 1)
    values = np.stack([table[name].to_numpy() for name in ("images", *SPENT)])
    parts = _binned(values, start_s, end_s, edges)
    rates = parts[0] / np.diff(edges)
    size, unit = next((u for u in UNITS if worked_s >= 2 * u[0]), UNITS[-1])
    middles = (edges[:-1] + edges[1:]) / 2 / size
    rules = tuple((at / size, "paused") for at in pauses)
    points = [0.0, *middles, worked_s / size], [rates[0], *rates, rates[-1]]
    series = [Series("images per second", list(zip(*points, strict=True)))]
    rate = lines("Images per second", series, f"{unit} at work", rules=rules)
    states = parts[1:].T
    totals = states.sum(axis=1, keepdims=True)
    shares = np.divide(states, totals, out=np.zeros_like(states), where=totals > 0)
    assert rate is not None
    return rate, stack("What the devices did", list(DEVICE), shares, rate)


def _binned(values: Array, start_s: Array, end_s: Array, edges: Array) -> Array:
    """Values (M, N) of attempts spread evenly over their time, summed in bins (M, B)."""
    total = np.zeros((len(values), len(edges) - 1))
    for at in range(0, len(start_s), CHUNK):
        part = slice(at, at + CHUNK)
        length_s = (end_s - start_s)[part, None]
        reached = np.clip(edges[None] - start_s[part, None], 0, length_s)
        total += values[:, part] @ (np.diff(reached, axis=1) / length_s)
    return total


def _actors(table: pa.Table) -> Iterator[dict[str, Any]]:
    """What each did; ``shares`` by ``DEVICE``."""
    sums = [("shard_id", "count"), *((column, "sum") for column in ("images", *SPENT))]
    for row in table.group_by("actor").aggregate(sums).sort_by("actor").to_pylist():
        spent = [row[f"{column}_sum"] for column in SPENT]
        shares = [seconds / (sum(spent) or 1.0) for seconds in spent]
        shards, images = row["shard_id_count"], row["images_sum"]
        yield {"name": row["actor"], "shards": shards, "images": images, "shares": shares}
