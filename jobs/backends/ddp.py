"""The ranks of a training on a Ray cluster, placed and restarted by Ray Train.

A rank raises only errors that a restart may cure; a UnetJobsError ends all ranks normally and is
sent to the driver.
"""

import logging
import math
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.backends import session
from jobs.backends.actors import PLACING_WARNINGS_S
from jobs.backends.paths import require_shared, with_absolute_paths, worker_paths
from jobs.backends.placement import Placement, resolve_placement
from jobs.backends.version import code_version, require_same_code
from unet_core.config.predict import WorkersConfig
from unet_core.config.train import TrainConfig
from unet_core.errors import ConfigError, UnetJobsError, WorkersError
from unet_core.training.fit import Event, Step, fit
from unet_core.training.ranks import Ranks

log = logging.getLogger(__name__)

WAIT_S = 0.5
PATIENCE_S = 24 * 3600
"""Ranks wait so long for each other: one may read a large tar alone. Ray notices deaths itself."""


class Mailbox:
    """A Ray actor that carries events from the first rank to the driver, and stop requests to all
    ranks.
    """

    def __init__(self) -> None:
        self._said: list[Event | UnetJobsError] = []
        self._stops = False

    def say(self, *events: Event | UnetJobsError) -> bool:
        """Append events; return whether to stop."""
        self._said.extend(events)
        return self._stops

    def hear(self, stops: bool) -> list[Event | UnetJobsError]:
        """Take all events; ``stops`` requests a stop of the ranks."""
        self._stops = stops
        said, self._said = self._said, []
        return said


def fit_on_ranks(config: TrainConfig, wants_stop: Callable[[], bool]) -> Iterator[Event]:
    """Run ``fit`` on the ranks of a cluster; yield the events of the first rank.

    Raises what ``fit`` raises, and WorkersError if ranks cannot be placed or die too often.
    """
    with (
        session.connected(shows_logs=log.isEnabledFor(logging.INFO)),  # Ray Train logs a lot
        tempfile.TemporaryDirectory() as rays_own,
    ):
        require_shared(worker_paths(config), config.storage, len(session.working_nodes()))
        config = with_absolute_paths(config)
        ranks, each = _placed(config)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
        outcome: Future[Any] = Future()

        def run() -> None:
            try:
                outcome.set_result(_trainer(config, ranks, each, mailbox, rays_own).fit())
            except Exception as error:  # raised below, on the driver's thread
                outcome.set_exception(error)

        threading.Thread(target=run, name="ray train", daemon=True).start()
        is_over, warn_at = False, time.monotonic() + PLACING_WARNINGS_S[0]
        while not is_over:
            is_over = bool(wait([outcome], WAIT_S).done)
            if time.monotonic() > warn_at:
                warn_at = time.monotonic() + PLACING_WARNINGS_S[1]
                log.warning("no rank has begun: %s of %g GPU and %g CPU each are to be placed",
                            ranks, each.gpus, each.cpus)  # fmt: skip
            for event in ray.get(mailbox.hear.remote(wants_stop())):
                warn_at = math.inf
                if isinstance(event, UnetJobsError):
                    wait([outcome])
                    raise event
                yield event
        if error := outcome.exception():
            raise WorkersError(
                f"the ranks failed: {' '.join(str(error).split())[-600:]}"
            ) from error


def _trainer(
    config: TrainConfig, ranks: int | tuple[int, int], each: Placement, mailbox: Any, folder: str
) -> Any:
    """Create the trainer; ``folder`` holds Ray Train's own state."""
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    is_gpu = each.gpus > 0
    return TorchTrainer(
        _rank,
        train_loop_config={"config": config, "mailbox": mailbox, "code": code_version()},
        torch_config=TorchConfig(backend="nccl" if is_gpu else "gloo", timeout_s=PATIENCE_S),
        scaling_config=train.ScalingConfig(
            num_workers=ranks,
            use_gpu=is_gpu,
            resources_per_worker={"CPU": each.cpus} | ({"GPU": each.gpus} if is_gpu else {}),
        ),
        run_config=train.RunConfig(
            name=uuid.uuid4().hex,
            storage_path=folder,
            failure_config=train.FailureConfig(max_failures=config.workers.max_failures),
        ),
    )


def _rank(arguments: dict[str, Any]) -> None:
    """Run one rank, from the newest checkpoint to the end."""
    from ray.train.torch import get_device

    ranks = Ranks.joined()
    reporter = Reporter(arguments["mailbox"])
    node = f"node {ray.get_runtime_context().get_node_id()[:12]}"
    try:
        ranks.on_all(lambda: require_same_code(arguments["code"], code_version(), node))
        for event in fit(arguments["config"], ranks, get_device(), reporter.wants_stop):
            if ranks.is_first:
                reporter.say(event)
    except UnetJobsError as error:
        if ranks.is_first:
            reporter.say(error)


class Reporter:
    """Asks the driver whether to stop; on the first rank also sends events, steps in two messages a
    second.
    """

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._sent_at = time.monotonic()
        self._unsent: list[Event | UnetJobsError] = []
        self._stops = False

    def say(self, event: Event | UnetJobsError) -> None:
        """Send an event; a step goes with the next message."""
        self._unsent.append(event)
        if not isinstance(event, Step):
            self._send()

    def wants_stop(self) -> bool:
        """Return the driver's last answer. Ask when nothing was sent for half a second: no step is
        taken during the dataset scan and validation, and other ranks send no events.
        """
        if time.monotonic() - self._sent_at > WAIT_S:
            self._send()
        return self._stops

    def _send(self) -> None:
        self._stops = ray.get(self._mailbox.say.remote(*self._unsent))
        self._sent_at, self._unsent = time.monotonic(), []


def _placed(config: TrainConfig) -> tuple[int | tuple[int, int], Placement]:
    """Resolve the number of ranks (or the fewest and the most) and the resources of each.

    Raises WorkersError if the ranks do not fit, ConfigError for a batch that is too small.
    """
    workers, batch, count = config.workers, config.train.batch, config.workers.count
    fewest, most = count if isinstance(count, tuple) else (count, None)
    if isinstance(workers.gpus, float) and 0 < workers.gpus < 1:
        raise ConfigError(f"workers.gpus is {workers.gpus:g}, but every rank needs a whole GPU")
    wanted = WorkersConfig(count=fewest, gpus=workers.gpus, cpus=workers.cpus)
    placement = resolve_placement(
        wanted, session.available_resources(wanted), may_wait=most is not None
    )
    if batch < placement.actors:
        raise ConfigError(
            f"train.batch is {batch}, but there are {placement.actors} ranks; every rank needs a "
            "crop: raise it, or lower workers.count"
        )
    return placement.actors if most is None else (placement.actors, min(most, batch)), placement
