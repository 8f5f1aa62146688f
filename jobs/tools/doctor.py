"""``unet-jobs doctor``: checks of this machine, its cluster, and the model and paths of a config.

A check is a function that returns a description, or raises what is wrong; it imports what it needs
itself, so that a broken library is reported as a failed check.
"""

import os
import platform
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from jobs.backends import session
from jobs.backends.paths import data_paths
from jobs.backends.version import code_version, require_same_code
from unet_core.config.predict import PredictConfig, WorkersConfig
from unet_core.config.sections import StorageConfig
from unet_core.errors import ConfigError, StoreError, UnetJobsError, WorkersError
from unet_core.memory import usable_bytes

LIMIT_S = 20.0
"""Time for one check."""
ANSWER_S, STORE_S = 10.0, 5.0
"""Time for the answers of the cluster's nodes, for a busy store."""
NODES_ASKED = 8
"""Asking all nodes of a large cluster would take minutes."""


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    is_ok: bool
    says: str
    """Description, or what is wrong and what to do."""
    hangs: bool = False


def diagnose(config: PredictConfig | None = None) -> list[Check]:
    """Check this machine, its Ray cluster, and the model and paths of a config.

    Raises nothing: what is wrong is part of the result.
    """
    checks = MACHINE | (_checks_of(config) if config is not None else {})
    return [_isolated(name, check) for name, check in checks.items()]


def _isolated(name: str, check: Callable[[], str]) -> Check:
    """Run a check on a thread of its own, so that one that hangs can be given up."""
    found: list[Check] = []

    def run() -> None:
        try:
            found.append(Check(name, True, check()))
        except Exception as error:  # any error is a finding
            first = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            says = str(error) if isinstance(error, UnetJobsError) else first
            found.append(Check(name, False, says))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    return found[0] if found else Check(name, False, f"no answer in {LIMIT_S:g} s", hangs=True)


def processor() -> str:
    """Describe cores, instruction set, memory, and the code that runs on them."""
    import torch

    from unet_core.inference.engine import device_model

    kind = device_model(torch.device("cpu")).removeprefix("cpu ")
    return (
        f"{session.local_cpus(WorkersConfig()):g} cores, {kind}, {usable_bytes() / 1e9:.1f} GB of "
        f"memory; Python {platform.python_version()}, torch {torch.__version__}, {code_version()}"
    )


def gpu() -> str:
    """Compute something on each GPU."""
    import torch

    from unet_core.inference.engine import device_model

    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    has_driver = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    if not devices and has_driver:
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
        raise ConfigError(
            f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU: it {built}; "
            "install a torch for this driver, or let the container have the GPU"
        )
    texts = []
    for device in devices:
        one = torch.eye(64, device=device)
        if (one @ one).sum().item() != 64:
            raise WorkersError(f"{device} computes wrongly")
        texts.append(device_model(device))
        if device.type == "cuda":
            free, total = (size / 1e9 for size in torch.cuda.mem_get_info(device))
            texts[-1] += f", {free:.1f} of {total:.1f} GB free"
    return "; ".join(texts) or "none: networks run on the CPU"


def ray() -> str:
    """Describe the workers of a run; a cluster that is named must answer, with the same code."""
    version = import_module("ray").__version__
    if session.is_cluster_named():
        return f"{version}; {_cluster(os.environ['RAY_ADDRESS'])}"
    inline = session.is_inline(WorkersConfig())
    who = "this process does the work" if inline else "one actor on each GPU of this machine"
    return f"{version}; RAY_ADDRESS is not set: {who}"


def _cluster(address: str) -> str:
    if address == "local":
        return "a cluster would be started on this machine; not tried"
    with session.connected(shows_logs=False):
        nodes = session.available_resources(WorkersConfig())
        asked = session.code_on_nodes(NODES_ASKED, ANSWER_S)
    for node, version in asked.items():
        require_same_code(code_version(), version, f"node {node}")
    gpus, cores = (sum(has) for has in zip(*nodes, strict=True))
    has = f"{len(nodes)} nodes with {gpus:g} GPUs and {cores:g} CPU cores"
    return f"{address}, {has}; the same code on {len(asked)} of them"


def model(
    checkpoint: str = "builtin:nuclei", device: str = "auto", storage: StorageConfig | None = None
) -> str:
    """Read the header of a checkpoint."""
    from unet_core.inference.engine import choose_device
    from unet_core.networks.header import read_header

    names = ", ".join(read_header(checkpoint, storage).class_names)
    return f"{checkpoint}: {names}; here it would run on {choose_device(device)}"


MACHINE: dict[str, Callable[[], str]] = {
    "processor": processor,
    "GPU": gpu,
    "Ray": ray,
    "model": model,
}


def _checks_of(config: PredictConfig) -> dict[str, Callable[[], str]]:
    storage = config.storage.model_copy(
        update={"deadline_s": min(STORE_S, config.storage.deadline_s)}
    )
    return {
        "model": partial(model, config.model.checkpoint, config.model.device, storage),
        **{
            key: partial(_writable if key == "output.uri" else _readable, uri, storage)
            for key, uri in data_paths(config).items()
            if not uri.startswith("memory:")
        },
    }


def _readable(uri: str, storage: StorageConfig) -> str:
    """List a path, and read something in it."""
    from unet_core.storage.store import Store

    store, name = Store(uri, storage), ""
    if (size := store.size) is None:
        first = store.first()
        if first is None:
            raise StoreError(f"there is nothing at {uri}")
        name, size = first.name, first.bytes
    store.read(name, 0, min(1, size))
    return f"{uri} can be listed and read" if name else f"{uri} can be read, {size:,} bytes"


def _writable(uri: str, storage: StorageConfig) -> str:
    """Make and remove something in a folder, and see whether it can be made twice."""
    from unet_core.storage.store import Store

    store = Store(uri, storage)
    store.require_writable()
    if not store.supports_exclusive_create():
        return f"{uri} can be written, but nothing keeps two drivers of a run apart: start one only"
    return f"{uri} can be written"
