"""``unet-jobs doctor``: what this machine, its cluster and its stores are like, and what to do
where something is wrong. A check is a function that says how it is, or raises what is wrong; it
imports what it needs itself, so that a library that is broken is a line too.
"""

import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from jobs.backends import session
from jobs.backends.paths import data_paths
from jobs.backends.version import CodeVersion, code_version
from unet_core.config.predict import PredictConfig, WorkersConfig
from unet_core.config.sections import StorageConfig
from unet_core.errors import ConfigError, StoreError, UnetJobsError, WorkersError
from unet_core.memory import usable_bytes

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

LIMIT_S = 20.0
"""For one check."""
REACH_S, ANSWER_S, STORE_S = 3.0, 10.0, 5.0
NODES_ASKED = 8
LEAST_SPACE_BYTES = 2 * 2**30
LEAST_FILES = 1024
DISTRIBUTION = "unet-jobs"
MODULES = {"pillow": "PIL", "scikit-image": "skimage"}
"""Of libraries that are imported by another name."""
SHOWN = ("torch", "ray", "pyarrow", "numpy", "pillow", "tifffile")


@dataclass(frozen=True)
class Check:
    """What was looked at, and what was found."""

    name: str
    is_ok: bool
    says: str
    """How it is, or what is wrong and what to do."""
    hangs: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """All checks."""

    checks: tuple[Check, ...]

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.is_ok for check in self.checks)


def diagnose(config: PredictConfig | None = None) -> Diagnosis:
    """Check this machine, the cluster that is named, and the places and the model of a config.

    Raises nothing: what is wrong is said.
    """
    checks = dict(MACHINE)
    if session.is_cluster_named():
        checks["cluster"] = cluster
    if config is not None:
        checks |= _of_config(config)
    return Diagnosis(tuple(_isolated(name, check) for name, check in checks.items()))


def _isolated(name: str, check: Callable[[], str]) -> Check:
    """On a thread of its own: what hangs is given up, what fails is no more than a line."""
    found: list[Check] = []

    def run() -> None:
        try:
            found.append(Check(name, True, check()))
        except UnetJobsError as error:
            found.append(Check(name, False, str(error)))
        except Exception as error:  # whatever is wrong is what was asked for
            says = next(iter(str(error).strip().splitlines()), "")
            found.append(Check(name, False, f"{type(error).__name__}: {says}"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    return found[0] if found else Check(name, False, f"no answer in {LIMIT_S:g} s", hangs=True)


def libraries() -> str:
    """Everything that the package asks for can be imported, and is not too old."""
    from packaging.requirements import Requirement

    try:
        asked = map(Requirement, importlib.metadata.requires(DISTRIBUTION) or ())
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError("unet-jobs is not installed here: pip install unet-jobs") from error
    needed = [a for a in asked if a.marker is None or a.marker.evaluate({"extra": ""})]
    if wrong := list(filter(None, map(_wrong_with, needed))):
        raise ConfigError(f"{'; '.join(wrong)}: pip install --upgrade {DISTRIBUTION}")
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
    return f"{len(needed)} as required: {shown} ..."


def _wrong_with(needed: "Requirement") -> str:
    name, wanted = needed.name, needed.specifier
    try:
        has = importlib.metadata.version(name)
        importlib.import_module(MODULES.get(name, name))
    except Exception as error:  # a library that does not load may raise anything
        return f"{name} cannot be imported ({type(error).__name__}: {error})"
    return "" if wanted.contains(has, prereleases=True) else f"{name} is {has}, needed: {wanted}"


def cpu() -> str:
    """Cores, instruction set, memory."""
    import torch

    from unet_core.inference.engine import device_model

    cores = session.local_cpus(WorkersConfig())
    kind = device_model(torch.device("cpu")).removeprefix("cpu ")
    return f"{cores:g} cores, {kind}, {usable_bytes() / 1e9:.1f} GB of memory"


def gpus() -> str:
    """Each of them computes something."""
    import torch

    found = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    has_driver = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    if not found and has_driver:
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
        raise ConfigError(
            f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU: it {built}; "
            "install a torch for this driver, or let the container have the GPU"
        )
    return "; ".join(map(_computing, found)) or "none: networks run on the CPU"


def _computing(device: "torch.device") -> str:
    import torch

    from unet_core.inference.engine import device_model

    one = torch.eye(64, device=device)
    if (one @ one).sum().item() != 64:
        raise WorkersError(f"{device} computes wrongly")
    if device.type != "cuda":
        return device_model(device)
    free, total = torch.cuda.mem_get_info(device)
    return f"{device_model(device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def network() -> str:
    """The builtin checkpoint loads."""
    from unet_core.networks.checkpoint import load

    _, header = load("builtin:nuclei")
    return f"builtin:nuclei loads: {', '.join(header.class_names)}"


def ray() -> str:
    """It is there, and what would be done with it."""
    version = importlib.metadata.version("ray")
    importlib.import_module("ray")
    if session.is_cluster_named():
        return f"{version}, RAY_ADDRESS is {os.environ['RAY_ADDRESS']}"
    inline = session.is_inline(WorkersConfig())
    who = "this process does the work" if inline else "one actor on each GPU of this machine"
    return f"{version}; RAY_ADDRESS is not set: {who}"


def cluster() -> str:
    """The cluster answers, and its nodes have the code of this machine."""
    address = os.environ["RAY_ADDRESS"]
    if address == "local":
        return "one would be started on this machine; not tried"
    place = urlsplit(address if "://" in address else f"ray://{address}")
    if place.port is not None:  # Ray itself would try for a minute, and may end the process
        try:
            socket.create_connection((place.hostname or "", place.port), REACH_S).close()
        except OSError as error:
            raise WorkersError(f"{address} is not reached ({error}): is it up?") from error
    with session.connected(shows_logs=False):
        nodes = session.available_resources(WorkersConfig())
        asked = session.on_nodes(code_version, NODES_ASKED, ANSWER_S)
    for node, answer in asked.items():
        if not isinstance(answer, CodeVersion):
            raise WorkersError(f"node {node} does not run unet-jobs: {answer}; install it there")
        code_version().require(answer, f"node {node}")
    gpus, cores = (sum(has) for has in zip(*nodes, strict=True))
    code = f"the same code on {len(asked)} of them"
    return f"{len(nodes)} nodes with {gpus:g} GPUs and {cores:g} CPU cores; {code}"


def temporary_space() -> str:
    """Where parts wait until they are whole."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < LEAST_SPACE_BYTES:
        raise StoreError(
            f"{free / 1e9:.1f} GB free in {folder}, where the masks of shards under way wait; make "
            "room, or set TMPDIR to a larger folder"
        )
    shared = Path("/dev/shm")  # Ray's objects lie there
    is_small = shared.exists() and shutil.disk_usage(shared).free < session.OBJECT_STORE_BYTES
    hint = f"; {shared} is small: of a container, --shm-size=1g" if is_small else ""
    return f"{free / 1e9:.1f} GB free in {folder}{hint}"


def open_files() -> str:
    """How many this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < LEAST_FILES:
        raise WorkersError(f"at most {soft}, and Ray needs {LEAST_FILES}: ulimit -n 65536")
    return f"at most {soft:,}" if soft >= 0 else "any number"


MACHINE: dict[str, Callable[[], str]] = {
    "python": lambda: f"{platform.python_version()}; {code_version()}",
    "libraries": libraries,
    "cpu": cpu,
    "gpus": gpus,
    "network": network,
    "temporary space": temporary_space,
    "open files": open_files,
    "ray": ray,
}


def _of_config(config: PredictConfig) -> dict[str, Callable[[], str]]:
    deadline_s = min(STORE_S, config.storage.deadline_s)
    storage = config.storage.model_copy(update={"deadline_s": deadline_s})
    checks: dict[str, Callable[[], str]] = {"model": partial(_model, config, storage)}
    places = data_paths(config)
    if in_s3 := [uri for uri in places.values() if uri.startswith("s3://")]:
        checks["credentials"] = partial(_credentials, in_s3[0], storage)
    for key, uri in places.items():
        check = _writable if key == "output.uri" else _readable
        if not uri.startswith("memory://"):
            checks[key] = partial(check, uri, storage)
    return checks


def _model(config: PredictConfig, storage: StorageConfig) -> str:
    from unet_core.inference.engine import choose_device
    from unet_core.networks.header import read_header

    name = config.model.checkpoint
    header, device = read_header(name, storage), choose_device(config.model.device)
    return f"{name}: {', '.join(header.class_names)}; here it would run on {device}"


def _credentials(uri: str, storage: StorageConfig) -> str:
    """Where they come from, never what they are."""
    from unet_core.storage.store import Store

    if storage.anonymous:
        return "none are used (storage.anonymous)"
    found = Store(uri, storage).credentials()
    if not found:
        raise StoreError(
            "none for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, storage.profile, or "
            "storage.anonymous = true"
        )
    return f"of S3 by {found}"


def _readable(uri: str, storage: StorageConfig) -> str:
    """It can be listed, and something in it read."""
    from unet_core.storage.store import Store

    store = Store(uri, storage)
    if store.size is not None:
        store.read("", 0, 1)
        return f"{uri} can be read, {store.size:,} bytes"
    first = store.first()
    if first is None:
        raise StoreError(f"there is nothing at {uri}")
    store.read(first.name, 0, min(1, first.bytes))
    return f"{uri} can be listed and read (looked at {first.name})"


def _writable(uri: str, storage: StorageConfig) -> str:
    """Something can be made and removed there, and made only once."""
    from unet_core.storage.store import Store

    store = Store(uri, storage)
    store.require_writable()
    if not store.has_one_winner():
        return f"{uri} can be written, but nothing keeps two drivers of a run apart: start one only"
    return f"{uri} can be written"
