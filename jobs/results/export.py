"""``unet-jobs export``: a run's masks and objects in the formats of other programs."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.backends.tasks import run_tasks
from unet_core.concurrency import READ_THREADS, map_in_order
from unet_core.config.predict import PredictConfig
from unet_core.config.sections import StorageConfig
from unet_core.config.uris import refuse_nesting
from unet_core.errors import ConfigError
from unet_core.export import coco
from unet_core.export.names import Names
from unet_core.export.task import EXTENSIONS, Export, Options
from unet_core.inputs.shards import Shard
from unet_core.runs.parts import read_columns
from unet_core.runs.reader import Results
from unet_core.runs.run import open_existing
from unet_core.storage.spool import drop
from unet_core.storage.store import Store, split

ANNOTATIONS = "annotations.json"  # as COCO's own tools call it
ANNOTATED_AT_ONCE = 4  # shards with all their annotations in memory
HEAD_BYTES = 1024  # the beginning of a document, which holds its digest


@dataclass(frozen=True)
class Exported:
    """Outcome of an export."""

    task: Export
    images: Counter[str]
    """Number of images by status: ``ok`` were written, of ``failed`` ones the run has no mask."""
    problems: list[tuple[str, str]]
    """Images that could not be written, and why."""
    shards_refused: dict[str, str]


def export_run(results: Results, config: PredictConfig, options: Options, out: str) -> Exported:
    """Export every committed shard of a run that is not exported yet.

    ``out``: a folder; empty: the run's own ``objects``.
    """
    store = Store(out or f"{results.run.uri.rstrip('/')}/objects", config.storage)
    if out:
        require_apart(results, "--out", out)
    if options.format == "coco":
        coco.require_library()
    has_input = bool(options.objects) and results.source.root.exists()
    shards = results.shards()
    names = _names(results, shards, options)
    task = Export(results, store, options, names, has_input, is_of_run=not out)
    task.create_or_join()
    paths = {"RUN": results.run.uri, "--out": store.uri()}
    refused = run_tasks(task, shards, config, paths, "exporting")
    there = task.done()
    done = [shard.shard_id for shard in shards if shard.shard_id in there]
    if options.format == "coco":
        _write_annotations(task, done)
    return _outcome(task, done, refused)


def require_apart(results: Results, option: str, out: str) -> None:
    """Raises ConfigError for a folder in the input, which would read what is there as images."""
    if not results.source.names:  # else the input is but those
        refuse_nesting(option, out, {"the run's input": results.source.root.uri()})


def _names(results: Results, shards: list[Shard], options: Options) -> Names:
    """Names of the files, from all ids of the run."""
    if options.format not in EXTENSIONS:
        return Names("")

    def ids(shard: Shard) -> pa.Array:
        table = read_columns(results.run.store, shard.shard_id, "image_id", "status")
        return table.filter(pc.field("status") == "ok")["image_id"].combine_chunks()

    return Names.among(EXTENSIONS[options.format], map_in_order(ids, shards))


def _outcome(task: Export, done: list[str], shards_refused: dict[str, str]) -> Exported:
    images, problems = Counter[str](), []
    for row in _rows(task, done, ["image_id", "status", "problem"]):
        images[row["status"]] += 1
        if row["status"] == "refused":
            problems.append((row["image_id"], row["problem"]))
    return Exported(task, images, problems, shards_refused)


def _write_annotations(task: Export, done: list[str]) -> None:
    """One document of what the index has, in the order of the manifest: ids are always the same.
    One that is of the same shards and masks is left alone.
    """
    masks = map_in_order(task.masks_sha256, done)
    state = json.dumps(list(zip(done, masks, strict=True)))
    digest = hashlib.sha256(state.encode()).hexdigest()
    store, names = task.store, task.results.class_names
    if store.exists(ANNOTATIONS) and digest.encode() in store.read(ANNOTATIONS, 0, HEAD_BYTES):
        return
    images = (
        {"id": number, "file_name": row.pop("image_id"), **row}
        for number, row in _exported(task, done, ["image_id", "height", "width"], READ_THREADS)
    )
    annotations = (
        {**annotation, "image": number}
        for number, row in _exported(task, done, ["annotations"], ANNOTATED_AT_ONCE)
        for annotation in row["annotations"]
    )
    file = coco.document(names, digest, images, annotations)
    try:
        store.publish(ANNOTATIONS, file)
    finally:
        drop(file)


def _exported(
    task: Export, done: list[str], columns: list[str], threads: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Index rows of written images, numbered."""
    rows = _rows(task, done, ["status", *columns], threads)
    return enumerate((row for row in rows if row.pop("status") == "ok"), start=1)


def _rows(
    task: Export, done: list[str], columns: list[str], threads: int = READ_THREADS
) -> Iterator[dict[str, Any]]:
    """Index rows of shards, in their order; a shard for each thread is in memory."""
    shards = map_in_order(lambda shard_id: [*task.exported(shard_id, columns)], done, threads)
    return chain.from_iterable(shards)


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
