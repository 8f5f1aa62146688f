"""What is done to a run, cell by cell: a fault at a stage, and how the run is judged afterwards."""

import contextlib
import fnmatch
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos import oracle
from tests.chaos.data import FACTORY, Data, Image, make, write_toml
from tests.chaos.faults import PLAN, Fault, Plan
from tests.chaos.processes import ClusterHost, Driver, StoreHost, forked
from tests.support.data import write_checkpoint
from unet_core.config.presets import Factory
from unet_core.config.sections import StorageConfig
from unet_core.runs.verify import verify

DATA_SETS = 6
KILLED, STOPPED = -9, -19
KINDS = (*oracle.KINDS, "verify", "failure_count", "ended")
SHARED = {"shared": True}
ACTORS = {"count": 2, "gpus": 1, "cpus": 1}
OF_SHARDS = ("before masks", "inside masks", "before metrics", "inside metrics", "after commit")
OF_ACTORS = ("reading", "decoding", "device", *OF_SHARDS)
OF_DRIVERS = (
    *OF_ACTORS,
    "before run.json", "inside run.json", "before manifest", "inside manifest",
    "inside timings", "before success", "inside success",
)  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    """An input, its run without any fault, and what that took."""

    data: Data
    run: Path
    seconds: float


@dataclass
class Result:
    """One run of one cell."""

    fired: bool
    seconds: float = 0.0
    over: float = 0.0
    """Seconds beyond those of the undisturbed run."""
    held: list[int] = field(default_factory=list)
    """How many shards each actor had that died."""
    findings: oracle.Findings = field(default_factory=lambda: {kind: [] for kind in KINDS})

    @property
    def is_clean(self) -> bool:
        return not any(self.findings.values())


class Bench:
    """Inputs, undisturbed runs and the cluster of one call of the harness."""

    def __init__(self, work: Path, seed: int, plants: tuple[str, ...] = ()) -> None:
        self.work, self.seed, self.plants = work, seed, plants
        os.environ[PLAN] = str(work / "plan.json")
        self._made: dict[int, Undisturbed] = {}
        self._host: ClusterHost | None = None
        self._store: StoreHost | None = None
        self._in_store: dict[Path, Undisturbed] = {}
        self._actors_s: float | None = None
        network = Factory(FACTORY, {"in_channels": 1, "classes": 1}, 1, 1)
        self._plan("checkpoint").write()
        self.checkpoint = forked(write_checkpoint, work / "model.safetensors", network)

    def _plan(self, name: str, *faults: Fault) -> Plan:
        return Plan(self.work / "faults" / name, faults, self.plants)

    def undisturbed(self, number: int) -> Undisturbed:
        """One of the inputs: two with tars, then one with loose images, and so on."""
        if number not in self._made:
            draw = random.Random(f"{self.seed} data {number}")
            data = make(self.work / f"input{number}", draw, is_loose=number % 3 == 2)
            self._plan(f"undisturbed{number}").write()
            run = self.work / f"undisturbed{number}"
            start = time.monotonic()
            driver = Driver(write_toml(data.table(self.checkpoint, run), run.with_suffix(".toml")))
            if driver.wait() != 0:
                raise RuntimeError(f"the undisturbed run failed: {driver.last_words}")
            self._made[number] = Undisturbed(data, run, time.monotonic() - start)
        return self._made[number]

    @property
    def host(self) -> ClusterHost:
        if self._host is None:
            self._host = ClusterHost()
        return self._host

    @property
    def store(self) -> StoreHost:
        if self._store is None:
            self._store = StoreHost()
        return self._store

    def store_table(self, data: Data, name: str) -> dict[str, dict]:
        """The config of a run in the object store, whose input is there too."""
        table = data.table(self.checkpoint, Path("run"))
        table["input"]["uri"] = self.store.upload(data.root)
        table["output"]["uri"] = self.store.uri(name)
        return table | {"storage": {"endpoint_url": self.store.url, "deadline_s": 60}}

    def in_store(self, base: Undisturbed) -> Undisturbed:
        """The undisturbed run of an input in the object store, fetched from there."""
        if base.run not in self._in_store:
            self.store.use([])
            self._plan(f"store-{base.run.name}").write()
            name = f"store-{base.run.name}"
            toml = write_toml(self.store_table(base.data, name), self.work / f"{name}.toml")
            start = time.monotonic()
            driver = Driver(toml)
            if driver.wait() != 0:
                raise RuntimeError(f"the undisturbed run failed: {driver.last_words}")
            seconds = time.monotonic() - start
            self.store.download(name, self.work / name)
            self._in_store[base.run] = Undisturbed(base.data, self.work / name, seconds)
        return self._in_store[base.run]

    def actors_s(self) -> float:
        """What an undisturbed run on actors takes, once the cluster is warm."""
        if self._actors_s is None:
            data = self.undisturbed(0).data
            self._plan("actors").write()
            for attempt in range(2):
                start = time.monotonic()
                out = self.work / f"actors{attempt}"
                table = data.table(self.checkpoint, out, workers=ACTORS, storage=SHARED)
                if error := self.host.predict(table)["error"]:
                    raise RuntimeError(f"the undisturbed run on actors failed: {error}")
                self._actors_s = time.monotonic() - start
        return self._actors_s

    def close(self) -> None:
        if self._host is not None:
            self._host.close()
            self._host = None
        if self._store is not None:
            self._store.close()
            self._store = None


class Case:
    """One run of a cell: what was drawn for it, and its findings."""

    def __init__(self, bench: Bench, cell: "Cell", number: int) -> None:
        self.bench, self.cell = bench, cell
        self.draw = random.Random(f"{bench.seed} {cell.name} {number}")
        chosen = self.draw.choice([n for n in range(DATA_SETS) if cell.fits(n % 3 == 2)])
        self.base = bench.undisturbed(chosen)
        self.data = self.base.data
        self.folder = bench.work / "runs" / f"{cell.name.replace('/', '-')}-{number}"
        self.folder.mkdir(parents=True)
        self.run = self.folder / "run"
        self.victims: dict[str, str] = {}
        """Images that must fail by mishap, with their error codes."""
        self.may_be_hit: dict[str, str] = {}
        """Those that only may."""
        self.deaths: list[dict[str, Any]] = []
        self.storage: StorageConfig | None = None
        """Where the input is, if not on this disk."""
        self.result = Result(fired=False)
        self.plan = Plan(self.folder / "faults", (), bench.plants)

    def suffer(self, action: str, times: int = 1, image: str = "") -> None:
        """Let faults happen at the cell's stage, at moments that are drawn."""
        count = passages(self.data, self.cell.stage)
        moments = [self.draw.randint(1, count)]
        for _ in range(times - 1):
            moments.append(moments[-1] + self.draw.randint(1, count))
        fault = Fault(self.cell.stage, action, () if image else tuple(moments), image)
        self.plan = Plan(self.plan.folder, (fault,), self.bench.plants)

    def toml(self, name: str = "job", **sections: dict) -> Path:
        table = self.data.table(self.bench.checkpoint, self.run, **sections)
        return write_toml(table, self.folder / f"{name}.toml")

    def ended(self, who: str, driver: Driver, code: int | None, allowed: tuple[int, ...]) -> None:
        """Hold an exit code against those that are right."""
        if code not in allowed:
            said = "hung" if code is None else f"exit code {code}: {driver.last_words}"
            self.result.findings["ended"].append(f"{who} {said}")

    def again(self, allowed: tuple[int, ...] = (KILLED,), **sections: dict) -> None:
        """The same command until it ends as it should, or is at its wits' end."""
        for _ in range(8):
            driver = Driver(self.toml(**sections))
            code = driver.wait()
            if code not in allowed:
                break
        self.ended("the same command", driver, code, (0,))

    def judged(self, seconds: float, base_s: float) -> Result:
        self.result.seconds, self.result.over = seconds, seconds - base_s
        self.result.fired = self.result.fired or self.plan.fired() > 0
        expected = [
            (image.image_id, self.victims.get(image.image_id, image.code))
            for image in self.data.images
        ]
        found = forked(oracle.examine, self.run, self.base.run, expected, self.may_be_hit)
        found |= forked(_judge, self.run, set(self.victims), self.deaths, self.storage)
        for kind, texts in found.items():
            self.result.findings[kind] += texts
        if self.result.is_clean:
            shutil.rmtree(self.folder)
        return self.result


def _judge(
    run: Path, victims: set[str], deaths: list[dict[str, Any]], storage: StorageConfig | None
) -> oracle.Findings:
    """The product's own word, and whether innocents were charged."""
    found: oracle.Findings = {"verify": [], "failure_count": []}
    try:
        found["verify"] = verify(str(run), deep=True, storage=storage).problems
    except Exception as error:
        found["verify"] = [f"verify fails: {error}"]
    guilty = {
        shard
        for shard, part in (oracle.parts(run, "metrics") if victims and deaths else {}).items()
        if victims & {row["image_id"] for row in part.rows}
    }
    for death in deaths:
        for shard in death["failure_count"]:
            if len(death["held"]) != 1 or death["node_lost"]:
                found["failure_count"].append(f"{shard}, when an actor died with {death}")
            elif victims and shard not in guilty:
                found["failure_count"].append(f"{shard}, which holds no poisoned image")
    return found


def passages(data: Data, stage: str) -> int:
    """How often an undisturbed run passes a stage, at least."""
    if stage == "decoding" or (stage == "reading" and data.shard_images):
        return len(data.images)
    if stage in (*OF_SHARDS, "reading", "device"):
        return len(data.shards)
    return 1


# Kinds of cells


def _driver(case: Case) -> Result:
    """The driver is killed, once to three times; the same command again until it ends."""
    case.suffer("kill", times=case.draw.randint(1, 3))
    case.plan.write()
    start = time.monotonic()
    case.again()
    return case.judged(time.monotonic() - start, case.base.seconds)


def _fresh(case: Case) -> Result:
    """As ``_driver``, with a fresh interpreter first: forks are as good."""
    case.suffer("kill")
    case.plan.write()
    toml = case.toml()
    start = time.monotonic()
    command = [sys.executable, "-m", "jobs", "predict", str(toml)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != KILLED:
        case.result.findings["ended"].append(f"the fresh driver {done.returncode}: {done.stderr}")
    case.again()
    return case.judged(time.monotonic() - start, case.base.seconds)


def _late(case: Case) -> Result:
    """A driver sleeps while another does all the work, then wakes up."""
    case.suffer("stop")
    case.plan.write()
    start = time.monotonic()
    late = Driver(case.toml("late"))
    if (code := late.wait(may_stop=True)) == STOPPED:
        other = Driver(case.toml("other"))
        case.ended("the other driver", other, other.wait(), (0,))
        late.resume()
        code = late.wait()
    case.ended("the late driver", late, code, (0,))
    return case.judged(time.monotonic() - start, case.base.seconds)


def _two(case: Case) -> Result:
    """Two drivers at once; one may be killed."""
    if case.cell.stage == "start":
        case.result.fired = True
    else:
        case.suffer("kill")
    case.plan.write()
    start = time.monotonic()
    drivers = [Driver(case.toml("one"))]
    time.sleep(case.draw.choice([0, 0.01, 0.1, 0.2]))
    drivers.append(Driver(case.toml("two")))
    codes = [driver.wait() for driver in drivers]
    allowed = (0,) if case.cell.stage == "start" or KILLED not in codes else (0, KILLED)
    for who, driver, code in zip(("one", "two"), drivers, codes, strict=True):
        case.ended(f"driver {who}", driver, code, allowed)
    case.again()
    return case.judged(time.monotonic() - start, case.base.seconds)


def _on_actors(case: Case, losing_a_node: bool = False, **sections: dict) -> Result:
    """A run on two actors, that must end in one session and charge nobody without proof."""
    base_s = case.bench.actors_s()
    case.plan.write()
    sections = {"workers": ACTORS, "storage": SHARED} | sections
    table = case.data.table(case.bench.checkpoint, case.run, **sections)
    start = time.monotonic()
    outcome = case.bench.host.predict(table, losing_a_node)
    seconds = time.monotonic() - start
    if outcome.get("is_broken"):
        case.bench.close()
    if outcome["error"]:
        case.result.findings["ended"].append(outcome["error"])
    for shard, reason in outcome["set_aside"].items():
        case.result.findings["ended"].append(f"{shard} was set aside: {reason}")
    case.deaths = outcome["deaths"]
    case.result.held = [len(death["held"]) for death in case.deaths]
    return case.judged(seconds, base_s)


def _actor(case: Case) -> Result:
    """An actor is killed, or says that its memory or its device is gone."""
    case.suffer(case.cell.action)
    return _on_actors(case)


def _node(case: Case) -> Result:
    """A node crashes while both actors are at work, each on a node of its own."""
    first = case.draw.randint(1, max(1, len(case.data.shards) - 3))
    fault = Fault(case.cell.stage, "wait", (first, first + 1))
    case.plan = Plan(case.plan.folder, (fault,), case.bench.plants)
    workers = {**ACTORS, "accelerator_type": "CHAOS"}
    result = _on_actors(case, losing_a_node=True, workers=workers)
    result.fired = any(death["node_lost"] and death["held"] for death in case.deaths)
    return result


STORE_FAULTS = ("slow down", "internal error", "reset", "cut inside", "reset after", "lost answer")
POISON = {"kill": "worker_died", "hang": "timeout", "eat": "out_of_memory"}


def _poison(case: Case) -> Result:
    """One image spoils every process that decodes it, and becomes one failed row."""
    seen = Counter(image.image_id for image in case.data.images)
    alone = [image for image in case.data.segmented if seen[image.image_id] == 1]
    victim = case.draw.choice(alone).image_id
    case.victims = {victim: POISON[case.cell.action]}
    case.suffer(case.cell.action, image=victim)
    return _on_actors(case, errors={"stall_s": 4}, storage={**SHARED, "deadline_s": 2})


def _input(case: Case) -> Result:
    """An object is rewritten, deleted or added while the run goes on; tars set their shard aside
    until they are what they were.
    """
    victim = case.draw.choice(case.data.segmented)
    code = {"rewritten": "changed", "deleted": "missing"}.get(case.cell.action, "")
    is_tar, is_unread = not case.data.shard_images, case.cell.stage == "before manifest"
    case.suffer("wait")
    case.plan.write()
    start = time.monotonic()
    driver = Driver(case.toml())
    while not case.plan.fired() and driver.is_alive:
        time.sleep(0.002)
    with _disturbed(case.data, victim, case.cell.action):
        case.plan.go.touch()
        code_of_exit = driver.wait()
        said = driver.log.read_text()
    if is_tar and code:
        case.ended("the driver", driver, code_of_exit, (1,) if is_unread else (0, 1))
        if code_of_exit == 1 and victim.shard not in said:
            case.result.findings["ended"].append(f"{victim.shard} is not named: {said[-300:]}")
        case.again()
    else:
        hit = {victim.image_id: code} if code else {}
        case.victims, case.may_be_hit = (hit, {}) if is_unread else ({}, hit)
        case.ended("the driver", driver, code_of_exit, (0,))
    return case.judged(time.monotonic() - start, case.base.seconds)


@contextlib.contextmanager
def _disturbed(data: Data, victim: Image, how: str) -> Iterator[None]:
    """An input that is changed for a while, and afterwards what it was, to the nanosecond."""
    path = data.root / (victim.image_id if data.shard_images else victim.shard)
    content, stat = path.read_bytes(), path.stat()
    added = path.with_name(f"added-{path.name}")
    if how == "rewritten":
        path.write_bytes(content[: len(content) // 2])
    elif how == "deleted":
        path.unlink()
    else:
        added.write_bytes(content)
    try:
        yield
    finally:
        added.unlink(missing_ok=True)
        if how != "added":
            path.write_bytes(content)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _store(case: Case) -> Result:
    """The object store refuses, breaks connections or loses answers, once here and once there."""
    base = case.bench.in_store(case.base)
    name = case.folder.name
    rules = []
    for method in ("GET", "PUT", "HEAD"):
        first = case.draw.randint(1, 10)
        rules.append((method, case.cell.action, first, first + case.draw.randint(0, 2)))
    case.plan.write()
    start = time.monotonic()
    case.bench.store.use(rules)
    table = case.bench.store_table(base.data, name)
    driver = Driver(write_toml(table, case.folder / "job.toml"))
    case.ended("the driver", driver, driver.wait(), (0,))
    seconds = time.monotonic() - start
    case.result.fired = case.bench.store.hits() > 0
    case.bench.store.use([])
    case.storage = StorageConfig(endpoint_url=case.bench.store.url)
    case.bench.store.download(name, case.run)
    case.base = base
    return case.judged(seconds, base.seconds)


@dataclass(frozen=True)
class Cell:
    """A fault at a stage."""

    kind: str
    stage: str
    perform: Callable[[Case], Result]
    action: str = "kill"
    is_loose: bool | None = None
    """Whether it wants loose images, or tars; None if it does not mind."""

    @property
    def name(self) -> str:
        parts = [self.kind, self.stage]
        if self.kind in ("crash", "poison", "input", "store"):
            parts.append(self.action)
        if self.kind == "input":
            parts.append("loose" if self.is_loose else "tar")
        return "/".join(parts).replace(" ", "-")

    def fits(self, is_loose: bool) -> bool:
        return self.is_loose in (None, is_loose)


CELLS = (
    *(Cell("driver", stage, _driver) for stage in OF_DRIVERS),
    *(Cell("late", stage, _late, "stop") for stage in OF_DRIVERS),
    Cell("two", "start", _two),
    Cell("two", "decoding", _two),
    Cell("two", "inside metrics", _two),
    Cell("fresh", "decoding", _fresh),
    *(
        Cell("input", stage, _input, action, is_loose=is_loose)
        for stage in ("before manifest", "decoding")
        for action in ("rewritten", "deleted", "added")
        for is_loose in (False, True)
    ),
    *(Cell("store", "requests", _store, action, False) for action in STORE_FAULTS),
    *(Cell("actor", stage, _actor) for stage in OF_ACTORS),
    *(Cell("crash", "device", _actor, action) for action in ("memory error", "runtime error")),
    Cell("node", "device", _node, "wait"),
    *(Cell("poison", "decoding", _poison, action) for action in POISON),
)


def chosen(pattern: str) -> list[Cell]:
    """Cells whose names fit one of the comma-separated patterns."""
    patterns = pattern.split(",")
    return [c for c in CELLS if any(fnmatch.fnmatch(c.name, f"{p}*") for p in patterns)]
