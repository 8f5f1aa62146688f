"""``unet-jobs status``: the state of a run or a training. Writes nothing."""

from dataclasses import dataclass

from unet_core.config.sections import StorageConfig
from unet_core.metrics import Totals
from unet_core.runs.run import open_existing
from unet_core.runs.timings import Seconds, recent_seconds
from unet_core.storage.store import Store
from unet_core.training.training_run import TrainingRun, TrainingState, is_training


@dataclass(frozen=True)
class Status:
    """State of a run."""

    uri: str
    shards: int
    committed: int
    is_finished: bool
    totals: Totals
    class_names: tuple[str, ...]
    seconds: Seconds
    """Seconds by stage over about the last hour of work."""


@dataclass(frozen=True)
class TrainingStatus:
    """State of a training."""

    uri: str
    steps: int
    position: TrainingState
    is_finished: bool
    metric: str


def status(uri: str, storage: StorageConfig | None = None) -> Status | TrainingStatus:
    """Read the folder of a run or of a training; raises StoreError if it is neither."""
    store = Store(uri, storage)
    if is_training(store):
        training = TrainingRun(store)
        return TrainingStatus(
            uri=store.uri(),
            steps=training.document["data"]["steps"],
            position=training.position(),
            is_finished=training.is_finished,
            metric=training.document["config"]["train"]["best"],
        )
    run, record = open_existing(uri, storage)
    committed = run.committed()
    return Status(
        uri=uri,
        shards=len(run.manifest() or ()),
        committed=len(committed),
        is_finished=run.is_finished,
        totals=run.finished_totals() if run.is_finished else run.totals(committed),
        class_names=record.class_names,
        seconds=recent_seconds(run.store),
    )
