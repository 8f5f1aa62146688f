"""Speed of a run and use of its devices over time, from ``timings/``.

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
from unet_core.report.charts import Plot, lines, stack
from unet_core.runs.timings import DEVICE, Seconds

BINS = 60
PAUSE_S = 120.0
"""Longest time without an attempt that is no pause."""
SPREAD = ["images", *(f"{stage}_s" for stage in DEVICE.values())]
"""Columns that are spread evenly over the time of an attempt."""
UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


class Activity:
    """Times of a run, from the rows in ``timings/``: at least one."""

    def __init__(self, table: pa.Table) -> None:
        ends_s = table["finished"].cast(pa.int64()).to_numpy() / 1e3
        begins_s = ends_s - np.maximum(table["whole_s"].to_numpy(), 1e-3)
        values = np.stack([table[name].to_numpy() for name in SPREAD])
        at_work_s, done, pauses_s = _at_work(begins_s, ends_s, values)
        self.began = datetime.datetime.fromtimestamp(float(begins_s.min()), datetime.UTC)
        self.ended: datetime.datetime = pc.max(table["finished"]).as_py()
        self.worked_s = float(at_work_s[-1])
        """Seconds in which any attempt was under way."""
        self.pauses = len(pauses_s)
        self.images: int = pc.sum(table["images"]).as_py()
        self.pixels: int = pc.sum(table["pixels"]).as_py()
        self.shares = Seconds.of_table(table).shares
        self.actors = list(_actors(table))
        self.plots: list[Plot] = []
        """Images per second, and the devices' states; empty for fewer than six shards."""
        if table.num_rows >= 6:
            edges_s = np.linspace(0, self.worked_s, min(BINS, 2 * table.num_rows) + 1)
            binned = [np.diff(np.interp(edges_s, at_work_s, sums)) for sums in done]
            self.plots = list(_plots(np.stack(binned), edges_s, pauses_s))


def _at_work(begins_s: Array, ends_s: Array, values: Array) -> tuple[Array, Array, list[float]]:
    """Follow attempts through time, idle times cut out: seconds at work at each begin and end, the
    sums of ``values`` (M, N) that were done by then, and the seconds at work before each pause.
    """
    times_s = np.concatenate([begins_s, ends_s])
    order = np.argsort(times_s, kind="stable")
    rates = np.concatenate([np.ones((1, len(ends_s))), values / (ends_s - begins_s)])
    under_way = np.concatenate([rates, -rates], axis=1)[:, order].cumsum(axis=1)[:, :-1]
    gaps_s, is_idle = np.diff(times_s[order]), under_way[0] == 0
    under_way[0] = 1
    grown = (under_way * np.where(is_idle, 0, gaps_s)).cumsum(axis=1)
    at_work_s, *done = np.pad(grown, ((0, 0), (1, 0)))
    return at_work_s, np.stack(done), at_work_s[:-1][is_idle & (gaps_s > PAUSE_S)].tolist()


def _plots(binned: Array, edges_s: Array, pauses_s: list[float]) -> Iterator[Plot]:
    """Plot the sums (M, B) of ``SPREAD`` in each bin."""
    worked_s = edges_s[-1]
    size, unit = next((u for u in UNITS if worked_s >= 2 * u[0]), UNITS[-1])
    rates = binned[0] / np.diff(edges_s)
    middles = (edges_s[:-1] + edges_s[1:]) / 2
    xs = np.concatenate([[0.0], middles, [worked_s]]) / size
    series = {"images per second": list(zip(xs, np.pad(rates, 1, "edge"), strict=True))}
    rules = tuple((at / size, "paused") for at in pauses_s)
    rate = lines("Images per second", series, f"{unit} at work", rules=rules)
    states = binned[1:].T
    totals = states.sum(axis=1, keepdims=True)
    shares = np.divide(states, totals, out=np.zeros_like(states), where=totals > 0)
    yield from (rate, stack("What the devices did", list(DEVICE), shares, rate))


def _actors(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Sum up the work of each actor."""
    for name in sorted(pc.unique(table["actor"]).to_pylist()):
        rows = table.filter(pc.field("actor") == name)
        yield {
            "name": name,
            "shards": rows.num_rows,
            "images": pc.sum(rows["images"]).as_py(),
            "shares": Seconds.of_table(rows).shares,
        }
