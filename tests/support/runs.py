"""Runs for tests: their configs, and what is in their folders."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from jobs.scheduler.scheduler import Scheduler
from unet_core.config.loading import build
from unet_core.config.predict import ErrorsConfig, PredictConfig
from unet_core.config.sections import StorageConfig
from unet_core.inputs.shards import Shard
from unet_core.runs.parts import masks_name, read_metrics
from unet_core.storage.parquet_files import decode_parquet


def config_of(uri, model, out, /, *overrides, **tables):
    """A run in this process, without a report; ``tables`` add to its sections."""
    base = {
        "input": {"uri": str(uri)},
        "model": {"checkpoint": model},
        "tile": {"size": 256},
        "output": {"uri": str(out), "report": False},
        "workers": {"count": "inline"},
    }
    merged = {name: {**base.get(name, {}), **tables.get(name, {})} for name in base | tables}
    return build(PredictConfig, merged, list(overrides))


def shard(name: str, size: int = 1) -> Shard:
    return Shard(name, name, size, None, None, None)


def scheduler_of(plan, errors=None, deadline_s=300):
    return Scheduler.of(plan, errors or ErrorsConfig(), StorageConfig(deadline_s=deadline_s))


def failures(scheduler):
    """Failures that were counted, by shard."""
    return {name: h.failures for name, h in scheduler.history.items() if h.failures}


def write_toml(config, path):
    lines = []
    for section, keys in config.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        lines += [
            f"{k} = {json.dumps(v)}" for k, v in keys.items() if k != "label_map" and v is not None
        ]
    path.write_text("\n".join(lines))
    return str(path)


def snapshot(run):
    return {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.is_file()}


def table(run, kind):
    files = sorted((run / kind).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def masks_of(run):
    found = {}
    for row in table(run, "masks"):
        shape = (row["height"], row["width"])
        if row["encoding"] == "png":
            found[row["image_id"]] = np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"])))
        else:
            found[row["image_id"]] = np.frombuffer(row["mask"], np.uint8).reshape(shape)
    return found


def masks_by_key(run):
    found = {}
    for shard_id in run.committed():
        keys = {r["image_id"]: r["key"] for r in read_metrics(run.store, shard_id)[0].to_pylist()}
        for window in decode_parquet(run.store.read(masks_name(shard_id))).to_pylist():
            found[keys[window["image_id"]]] = window["mask"]
    return found
