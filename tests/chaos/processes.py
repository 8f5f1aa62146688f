"""Drivers as forks of a process that has imported everything and used nothing, and a Ray cluster
in a process of its own.

The harness itself never runs torch, Arrow's threads or Ray, so that every fork is as good as a
fresh interpreter; cell ``fresh`` holds them against each other.
"""

import contextlib
import functools
import importlib.metadata
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas

from jobs import cli, predict
from jobs.backends import inline
from jobs.scheduler.events import Died, Event
from jobs.scheduler.scheduler import Scheduler, Worker
from tests.chaos.faults import PLAN, PLANTS, Plan
from unet_core.config.loading import build
from unet_core.config.predict import PredictConfig
from unet_core.inference import replica
from unet_core.runs import verify

LOADED = (cli, inline, pandas, predict, replica, verify)
"""What a driver imports when it needs it; Arrow imports pandas."""
importlib.metadata.packages_distributions = functools.cache(
    importlib.metadata.packages_distributions
)
"""Half a second for each driver with a factory, and the same for all of them."""
LIMIT_S = 120.0
"""No run of these small inputs takes so long unless it hangs."""
ACCELERATOR = "accelerator_type:CHAOS"


importlib.metadata.packages_distributions()


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a child process."""
    reading, writing = os.pipe()
    pid = _fork()
    if not pid:
        try:
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        with open(writing, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    is_good, answer = pickle.loads(data) if data else (False, f"{function} died")
    if not is_good:
        raise RuntimeError(answer)
    return answer


def _fork() -> int:
    _require_one_thread()
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()


def _require_one_thread() -> None:
    """A fork loses all threads but its own; the allocator's starts again by itself."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert sorted({*names} - {"jemalloc_bg_thd"}) == names[:1], f"threads: {names}"


class Driver:
    """``unet-jobs predict CONFIG.toml`` in a fork."""

    def __init__(self, toml: Path) -> None:
        self.log = toml.with_suffix(".log")
        self.code: int | None = None
        self.pid = _fork()
        if not self.pid:
            self._be(toml)

    def _be(self, toml: Path) -> None:
        code: Any = 70
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["unet-jobs", "predict", str(toml)]
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 70)

    def wait(self, may_stop: bool = False) -> int | None:
        """Its exit code, or minus the signal that ended or (if it ``may_stop``) stopped it; None
        if it hung, in which case it is dead now.
        """
        deadline = time.monotonic() + LIMIT_S
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | (os.WUNTRACED if may_stop else 0))
            if pid and os.WIFSTOPPED(status):
                return -os.WSTOPSIG(status)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return None
            else:
                time.sleep(0.002)
        return self.code

    @property
    def is_alive(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    @property
    def last_words(self) -> str:
        """The end of what it printed."""
        text = self.log.read_text() if self.log.exists() else ""
        return " | ".join(text.strip().splitlines()[-3:])[-400:]


class ClusterHost:
    """A process with a warm local Ray cluster, that is the driver of one run after another."""

    def __init__(self) -> None:
        _require_one_thread()
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_host, args=(theirs, self._pipe))
        self._process.start()
        theirs.close()

    def predict(self, table: dict, losing_a_node: bool = False) -> dict[str, Any]:
        """Run a config; gives ``error``, ``set_aside`` and ``deaths``."""
        self._pipe.send((table, losing_a_node))
        try:
            if self._pipe.poll(3 * LIMIT_S):
                return self._pipe.recv()
            reason = "it hung"
        except EOFError:
            reason = "the driver died"
        return {"error": reason, "set_aside": {}, "deaths": [], "is_broken": True}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _host(pipe: Any, other_end: Any) -> None:
    other_end.close()
    import ray
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[2]}"
    node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20}
    marked = {**node, "resources": {ACCELERATOR: 1}}
    with open(os.environ[PLAN] + ".ray.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**marked)
        ray.init(address=cluster.address, log_to_driver=False)
        plan = Plan.read()
        for bug in plan.plants:
            PLANTS[bug]()
        deaths: list[dict[str, Any]] = []
        _watch_deaths(deaths)
        while True:
            try:
                table, losing_a_node = pipe.recv()
            except EOFError:
                return
            deaths.clear()
            extra = cluster.add_node(**marked) if losing_a_node else None
            if extra is not None:
                remover = threading.Thread(
                    target=_remove, args=(cluster, extra, Plan.read(), deaths)
                )
                remover.start()
            pipe.send({**_predict(table), "deaths": list(deaths)})
            if extra is not None:
                remover.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
        Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)


class StoreHost:
    """A process with an object store and a proxy before it that does harm."""

    def __init__(self) -> None:
        _require_one_thread()
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._pipe))
        self._process.start()
        theirs.close()
        environment, self.url, self._bucket = self._pipe.recv()
        os.environ.update(environment)
        self._uploaded: set[str] = set()

    def uri(self, name: str) -> str:
        return f"s3://{self._bucket}/{name}"

    def upload(self, folder: Path) -> str:
        """Copy a folder, once."""
        if folder.name not in self._uploaded:
            self._uploaded.add(folder.name)
            self._ask("upload", folder, folder.name)
        return self.uri(folder.name)

    def download(self, name: str, folder: Path) -> None:
        """Copy everything below a name to local disk."""
        self._ask("download", name, folder)

    def use(self, rules: list[tuple[str, str, int, int]]) -> None:
        """Method, fault, and the first and the last of the requests that it happens to."""
        self._ask("use", rules)

    def hits(self) -> int:
        """Requests that a fault happened to."""
        return self._ask("hits")

    def _ask(self, *request: Any) -> Any:
        self._pipe.send(request)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(30)


def _serve(pipe: Any, other_end: Any) -> None:
    other_end.close()
    from tests.support.fault_proxy import FaultProxy, Rule
    from tests.support.s3 import BUCKET, start

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    s3, server = start()

    def download(name: str, folder: Path) -> None:
        for path, data in s3.objects(name).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)

    with FaultProxy(s3.url).running() as proxy:
        answers: dict[str, Callable[..., Any]] = {
            "upload": s3.upload,
            "download": download,
            "use": lambda rules: proxy.use(
                *(Rule(method, "", fault, first, last) for method, fault, first, last in rules)
            ),
            "hits": lambda: sum(rule.hits for rule in proxy.rules),
        }
        pipe.send((s3.environment(), proxy.url, BUCKET))
        with contextlib.suppress(EOFError):
            while True:
                what, *arguments = pipe.recv()
                pipe.send(answers[what](*arguments))
    server.stop()


def _predict(table: dict) -> dict[str, Any]:
    try:
        outcome = predict.predict(build(PredictConfig, table, []))
    except Exception:
        return {"error": traceback.format_exc(), "set_aside": {}}
    return {"error": "", "set_aside": outcome.set_aside}


def _watch_deaths(deaths: list[dict[str, Any]]) -> None:
    """Note what each dead actor held, and which shards were charged for it."""
    handle = Scheduler.handle

    def watched(scheduler: Scheduler, event: Event) -> None:
        worker = scheduler.workers.get(event.worker, Worker())
        held = [attempt.shard.shard_id for attempt in worker.held]
        before = {name: history.failures for name, history in scheduler.history.items()}
        handle(scheduler, event)
        if isinstance(event, Died):
            after = {name: history.failures for name, history in scheduler.history.items()}
            counted = [name for name, count in after.items() if count != before.get(name, 0)]
            deaths.append({"held": held, "failure_count": counted, "node_lost": event.node_lost})

    Scheduler.handle = watched


def _remove(cluster: Any, node: Any, plan: Plan, deaths: list[dict[str, Any]]) -> None:
    """Crash a node once both actors wait; the one that is left goes on when the other's death is
    known, since a process may outlive its node for a while.
    """
    deadline = time.monotonic() + LIMIT_S / 4
    while plan.fired() < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    cluster.remove_node(node, allow_graceful=False)
    while not deaths and time.monotonic() < deadline + LIMIT_S / 4:
        time.sleep(0.005)
    plan.go.touch()
