"""How faults get into processes: the checkpoint's factory wraps stage functions where it is called.

Whoever builds the network (a driver that works inline, an actor, a child of one) calls ``network``,
which reads the plan that the environment names. A fault counts how often its stage was reached in
all processes of a run together, and fires at the moments that were drawn for it.
"""

import contextlib
import fcntl
import functools
import json
import mmap
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import unet_core.inference.shard_segmenter
from jobs.scheduler.events import Died
from jobs.scheduler.scheduler import Scheduler
from tests.support.foreign import small
from unet_core.images.decoder import Decoder
from unet_core.images.sample import Sample
from unet_core.inference.engine import Engine
from unet_core.storage.store import Store

PLAN = "UNET_JOBS_CHAOS_PLAN"
WAIT_S = 60.0
SPARE_BYTES = 2**29
"""What a process that eats memory gets beyond what it has."""


@dataclass(frozen=True)
class Fault:
    """What happens at which passages of a stage, counted over all processes of a run."""

    stage: str
    action: str
    moments: tuple[int, ...] = ()
    """From 1; none means every time."""
    image: str = ""
    """Only passages of this image count; decoding alone."""


@dataclass(frozen=True)
class Plan:
    """What a run has to suffer. ``folder`` keeps the counts, and what fired."""

    folder: Path
    faults: tuple[Fault, ...] = ()
    plants: tuple[str, ...] = ()
    """Names of bugs."""

    def write(self) -> None:
        """Make it the plan of all processes that begin from now on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        table = asdict(self) | {"folder": str(self.folder)}
        path = Path(os.environ[PLAN])
        twin = path.with_suffix(".new")
        twin.write_text(json.dumps(table))
        twin.replace(path)

    @classmethod
    def read(cls) -> "Plan":
        table = json.loads(Path(os.environ[PLAN]).read_text())
        faults = [Fault(**{**f, "moments": tuple(f["moments"])}) for f in table["faults"]]
        return cls(Path(table["folder"]), tuple(faults), tuple(table["plants"]))

    def fired(self, number: int = 0) -> int:
        """How often one of its faults fired."""
        return sum(1 for _ in self.folder.glob(f"{number}-*.fired"))

    @property
    def go(self) -> Path:
        """What a waiting process waits for."""
        return self.folder / "go"

    def passed(self, number: int) -> int:
        """Count one more passage and give the sum."""
        with COUNTING, open(self.folder / f"{number}.count", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(b".")
            file.flush()
            return os.fstat(file.fileno()).st_size

    def meet(self, number: int) -> None:
        """Let a fault happen if this is its moment."""
        fault, count = self.faults[number], self.passed(number)
        if not fault.moments or count in fault.moments:
            (self.folder / f"{number}-{count}.fired").write_text(str(os.getpid()))
            with COUNTING if fault.action == "stop" else contextlib.nullcontext():
                ACTIONS[fault.action](self)


def network(**arguments: Any) -> nn.Module:
    """The network of every run of this package, and the faults of the plan, if there is one."""
    if PLAN in os.environ and not _installed:
        _installed.append(Plan.read())
        install(_installed[0])
    return small(**arguments)


_installed: list[Plan] = []
COUNTING = threading.Lock()
"""A process is not stopped while one of its threads has the lock that others wait for."""


def install(plan: Plan) -> None:
    """Plant bugs first, so that stages are those of the product with its bug."""
    for bug in plan.plants:
        PLANTS[bug]()
    for number, fault in enumerate(plan.faults):
        STAGES[fault.stage](functools.partial(plan.meet, number), fault)


# Stages: each wraps one function so that ``meet`` is called there.

Meet = Callable[[], None]


def around(
    owner: Any, name: str, meet: Meet, is_there: Callable[..., bool], after: bool = False
) -> None:
    """Meet the fault before (or after) the calls of ``owner.name`` for which ``is_there`` holds."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        here = is_there(*args)
        if here and not after:
            meet()
        result = original(*args, **kwargs)
        if here and after:
            meet()
        return result

    setattr(owner, name, wrapper)


def _reading(meet: Meet, fault: Fault) -> None:
    def is_input(store: Store, name: str, *_: Any) -> bool:
        return name.endswith((".png", ".tar", ".gz"))

    around(Store, "read", meet, is_input)
    around(Store, "open_raw", meet, is_input)


def _decoding(meet: Meet, fault: Fault) -> None:
    def is_there(_: Decoder, sample: Sample, *__: object) -> bool:
        """What is known to be bad is not decoded."""
        return not fault.image or (sample.image_id == fault.image and sample.failure is None)

    around(Decoder, "decode", meet, is_there)


def _device(meet: Meet, fault: Fault) -> None:
    around(Engine, "run", meet, lambda *_: True)


def _publishing(method: str, prefix: str, after: bool = False) -> Callable[[Meet, Fault], None]:
    def wrap(meet: Meet, fault: Fault) -> None:
        around(Store, method, meet, lambda _, name, *__: name.startswith(prefix), after)

    return wrap


def _either(*ways: Callable[[Meet, Fault], None]) -> Callable[[Meet, Fault], None]:
    def wrap(meet: Meet, fault: Fault) -> None:
        for way in ways:
            way(meet, fault)

    return wrap


def _inside(folder: str) -> Callable[[Meet, Fault], None]:
    """When bytes were written and synced, but nothing has its final name yet."""

    def is_there(descriptor: int) -> bool:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return path.parent.name == folder or path.name.lstrip("_").startswith(folder)

    return lambda meet, fault: around(os, "fsync", meet, is_there, after=True)


STAGES: dict[str, Callable[[Meet, Fault], None]] = {
    "reading": _reading,
    "decoding": _decoding,
    "device": _device,
    "before masks": _either(
        _publishing("publish_exclusively", "masks/"), _publishing("publish", "masks/")
    ),
    "inside masks": _inside("masks"),
    "before metrics": _publishing("publish_exclusively", "metrics/"),
    "inside metrics": _inside("metrics"),
    "after commit": _publishing("publish_exclusively", "metrics/", after=True),
    "before run.json": _publishing("publish_exclusively", "run.json"),
    "inside run.json": _inside("run.json"),
    "before manifest": _publishing("publish_exclusively", "manifest/"),
    "inside manifest": _inside("manifest"),
    "inside timings": _inside("timings"),
    "before success": _publishing("publish", "_SUCCESS"),
    "inside success": _inside("SUCCESS"),
}


# Actions


def _signal(number: signal.Signals) -> Callable[[Plan], None]:
    return lambda plan: os.kill(os.getpid(), number)


def _hang(plan: Plan) -> None:
    while True:
        time.sleep(3600)


def _eat(plan: Plan) -> None:
    """Allocate without end; a limit of the process stands for that of a container."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + SPARE_BYTES, before[1]))
    eaten = []
    try:
        while True:
            eaten.append(bytearray(2**24))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _wait(plan: Plan) -> None:
    """Let the harness do something meanwhile."""
    deadline = time.monotonic() + WAIT_S
    while not plan.go.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def _raise(error: Exception) -> Callable[[Plan], None]:
    def act(plan: Plan) -> None:
        raise error

    return act


ACTIONS: dict[str, Callable[[Plan], None]] = {
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "hang": _hang,
    "eat": _eat,
    "wait": _wait,
    "memory error": _raise(MemoryError("no memory left, says the harness")),
    "runtime error": _raise(RuntimeError("the device is gone, says the harness")),
}


# Bugs that the harness must find


def _swap_parts() -> None:
    """The commit comes before what it commits."""

    def commit(store: Store, shard_id: str, masks: Any, metrics: bytes) -> None:
        name = f"metrics/{shard_id}.parquet"
        if not store.exists(name) and store.publish_exclusively(name, metrics):
            store.publish(f"masks/{shard_id}.parquet", masks)

    unet_core.inference.shard_segmenter.commit = commit


def _no_rename() -> None:
    """A file grows under its final name."""

    def locally(store: Store, name: str, source: Any, settle: Any) -> None:
        path = store._path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(AttributeError):
            source.seek(0)
            source = source.read()
        with open(path, "xb" if settle.__name__ == "link" else "wb") as file:
            for half in (source[: len(source) // 2], source[len(source) // 2 :]):
                file.write(half)
                file.flush()
                os.fsync(file.fileno())

    Store._locally = locally


def _charge_innocent() -> None:
    """Whatever was in flight when an actor died is charged."""
    handle = Scheduler.handle

    def charging(scheduler: Scheduler, event: Any) -> None:
        if isinstance(event, Died) and event.worker in scheduler.workers:
            for attempt in scheduler.workers[event.worker].held[:-1]:
                scheduler.history[attempt.shard.shard_id].failures += 1
        handle(scheduler, event)

    Scheduler.handle = charging


def _count_twice() -> None:
    """Failed rows are written twice, and counted so."""
    part = unet_core.inference.shard_segmenter.metrics_part

    def twice(rows: list[dict[str, Any]], footer: dict[str, str]) -> bytes:
        failed = [row for row in rows if row["status"] == "failed"]
        seen = str(int(footer["images_seen"]) + len(failed))
        return part([*rows, *failed], {**footer, "images_seen": seen})

    unet_core.inference.shard_segmenter.metrics_part = twice


PLANTS: dict[str, Callable[[], None]] = {
    "swap-parts": _swap_parts,
    "no-rename": _no_rename,
    "charge-innocent": _charge_innocent,
    "count-twice": _count_twice,
}
