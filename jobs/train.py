"""``unet-jobs train``, top to bottom: the same code in this process and on ranks of a cluster."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jobs.backends import session
from jobs.progress import TrainProgress
from unet_core.config.train import TrainConfig
from unet_core.training.fit import Event, fit
from unet_core.training.training_run import BEST, TrainingState, open_training

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """Result of a training."""

    best: str
    """Path of the best weights."""
    position: TrainingState
    was_finished: bool
    """An earlier session had finished the training; nothing was done."""
    report: str
    """Path of the HTML report, if one was written."""


def train(config: TrainConfig) -> Trained:
    """Train to the end; after an interruption, the same call continues at the newest checkpoint.

    Raises a UnetJobsError for a config, checkpoint, input or store that cannot be used, and
    StoppedError when the process is asked to stop: during the scan of the images without a
    checkpoint, later after one.
    """
    run = open_training(config)
    was_finished = run.is_finished
    if not was_finished:
        with TrainProgress(config) as progress, _stop_asked() as wants_stop:
            for event in _events(config, wants_stop):
                progress.on_event(event)
    report = ""
    if config.output.report:
        from jobs.results.report import ending_report  # templates, charts

        report = ending_report(config.output, config.storage, not was_finished)
    return Trained(f"{config.output.uri.rstrip('/')}/{BEST}", run.position(), was_finished, report)


def _events(config: TrainConfig, wants_stop: Callable[[], bool]) -> Iterator[Event]:
    """Yield the events of the training in this process, or of the first rank on a Ray cluster."""
    if session.is_inline(config.workers):
        return fit(config, wants_stop=wants_stop)
    from jobs.backends.ddp import fit_on_ranks

    return fit_on_ranks(config, wants_stop)


@contextlib.contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM was received. The first signal lets the
    step end and a checkpoint be saved, the second one interrupts at once.
    """
    asked = threading.Event()

    def ask(*_: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        log.warning("stopping after a checkpoint; once more stops at once")
        asked.set()

    is_main = threading.current_thread() is threading.main_thread()  # others get no signals
    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM) if is_main}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
