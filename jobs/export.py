"""``unet-jobs export``: what a run holds, in the forms that other programs read."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.spread import spread
from unet_core.config import PredictConfig, StorageConfig, refuse_nesting
from unet_core.errors import ConfigError
from unet_core.export import coco
from unet_core.export.names import Names
from unet_core.export.task import EXTENSIONS, READ_THREADS, Export, Folder, Options
from unet_core.inputs.shards import Shard
from unet_core.parts import metrics_name
from unet_core.results import Results
from unet_core.run import open_existing
from unet_core.storage.spool import drop
from unet_core.storage.store import Store, split

ANNOTATIONS = "annotations.json"
OBJECTS = "objects"


@dataclass(frozen=True)
class Exported:
    """How an export stands."""

    uri: str
    written: int
    failed: int
    """Images that the run has no mask of."""
    problems: list[tuple[str, str]]
    """Images that could not be written, and why."""
    shards_refused: dict[str, str]
    has_input: bool
    is_all: bool
    """Whether the run is finished, so that no shard is still to come."""


def export_run(results: Results, config: PredictConfig, options: Options, out: str) -> Exported:
    """Export every committed shard of a run that is not exported yet.

    ``out``: a folder; empty: the run's own ``objects``.
    """
    store = Store(out or f"{results.run.uri.rstrip('/')}/{OBJECTS}", config.storage)
    if out:
        require_apart(results, "--out", out)
    if options.format == "coco":
        coco.require_library()
    has_input = bool(options.objects) and results.source.root.exists()
    shards = results.shards()
    names = _names(results, shards, options)
    task = Export(results, Folder(store, is_of_run=not out), options, names, has_input)
    task.establish()
    if {shard.shard_id for shard in shards} - task.done():
        store.remove(ANNOTATIONS)  # it will be another one
    places = {"RUN": results.run.uri, "--out": store.uri()}
    refused = spread(task, shards, config, places, "exporting")
    if options.format == "coco" and not store.exists(ANNOTATIONS):
        _write_annotations(task, shards)
    return _outcome(task, refused)


def require_apart(results: Results, option: str, out: str) -> None:
    """Raises ConfigError for a folder in the input, which would read what is there as images."""
    try:
        if not results.source.names:  # else the input is but those
            refuse_nesting(option, out, "the run's input", results.source.root.uri())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _names(results: Results, shards: list[Shard], options: Options) -> Names:
    """What the files will be called; all ids of the run are looked at."""
    if options.format not in EXTENSIONS:
        return Names("")

    def ids(shard: Shard) -> pa.Array:
        with results.run.store.open_parquet(metrics_name(shard.shard_id)) as file:
            table = file.read(columns=["image_id", "status"])
        return table.filter(pc.field("status") == "ok")["image_id"].combine_chunks()

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return Names.among(EXTENSIONS[options.format], pool.map(ids, shards))


def _outcome(task: Export, shards_refused: dict[str, str]) -> Exported:
    def look(shard_id: str) -> tuple[Counter[str], list[dict[str, Any]]]:
        rows = _index(task, shard_id, ["image_id", "status", "problem"])
        refused = rows.filter(pc.field("status") == "refused")
        return Counter(rows["status"].to_pylist()), refused.to_pylist()

    with ThreadPoolExecutor(READ_THREADS) as pool:
        looks = [*pool.map(look, sorted(task.indexed()))]
    images = sum((counts for counts, _ in looks), Counter[str]())
    return Exported(
        task.folder.store.uri(),
        images["ok"],
        images["failed"],
        [(row["image_id"], row["problem"]) for _, refused in looks for row in refused],
        shards_refused,
        task.has_input,
        task.results.run.is_finished,
    )


def _write_annotations(task: Export, shards: list[Shard]) -> None:
    """One document of what the index has, in the order of the manifest: ids are always the same."""
    there = set(task.indexed())
    ids = [shard.shard_id for shard in shards if shard.shard_id in there]
    store, names = task.folder.store, task.results.class_names
    file = coco.document(names, _images(task, ids), _annotations(task, ids))
    try:
        store.publish(ANNOTATIONS, file)
    finally:
        drop(file)


def _images(task: Export, ids: list[str]) -> Iterator[dict[str, Any]]:
    for number, row in _exported(task, ids, ["image_id", "height", "width"]):
        yield {"id": number, "file_name": row.pop("image_id"), **row}


def _annotations(task: Export, ids: list[str]) -> Iterator[dict[str, Any]]:
    for number, row in _exported(task, ids, ["annotations"]):
        for annotation in row["annotations"]:
            yield {**annotation, "image": number}


def _exported(
    task: Export, ids: list[str], columns: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """What was written of each image, and its number."""
    number = 0
    for shard_id in ids:
        for row in _index(task, shard_id, ["status", *columns]).to_pylist():
            if row.pop("status") == "ok":
                number += 1
                yield number, row


def _index(task: Export, shard_id: str, columns: list[str]) -> pa.Table:
    with task.folder.store.open_parquet(f"{task.folder.index}/{shard_id}.parquet") as file:
        return file.read(columns=columns)


def export_onnx(source: str, out: str, storage: StorageConfig, factory: str = "") -> int:
    """Write the network of a checkpoint, or of the run that used it; returns its bytes.

    Raises CheckpointError if the run's checkpoint is no longer the one that it used.
    """
    from unet_core.networks import checkpoint
    from unet_core.networks.onnx_export import to_onnx

    sha256 = None
    if not source.endswith(".safetensors") and not source.startswith("builtin:"):
        _, record = open_existing(source, storage)
        source, sha256 = record.config["model"]["checkpoint"], record.identity["model.sha256"]
    network, header = checkpoint.load(source, sha256, storage, factory)
    folder, name = split(out)
    store = Store(folder, storage)
    if store.exists(name):
        raise ConfigError(f"{out} exists; choose another name")
    data = to_onnx(network, header)
    store.publish(name, data)
    return len(data)
