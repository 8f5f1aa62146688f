"""Paths of a config by key: made absolute, and checked to be visible from all nodes."""

from pathlib import Path
from typing import TypeVar

from jobs.backends import session
from unet_core.config.predict import PredictConfig
from unet_core.config.sections import Section, StorageConfig
from unet_core.config.train import TrainConfig
from unet_core.config.uris import absolute, is_remote, plain
from unet_core.errors import ConfigError

ConfigT = TypeVar("ConfigT", PredictConfig, TrainConfig)


def data_paths(config: PredictConfig | TrainConfig) -> dict[str, str]:
    """Return the data paths of a config, by key."""
    return config.read_paths | {"output.uri": config.output.uri}


def worker_paths(config: PredictConfig | TrainConfig) -> dict[str, str]:
    """Return the paths that workers of the connected cluster must reach: data, and the checkpoint
    unless it is built in or among the files of a job.
    """
    named = config.model.checkpoint
    is_elsewhere = bool(named) and not named.startswith("builtin:")
    if is_elsewhere and not is_remote(named) and not Path(named).is_absolute():
        is_elsewhere = not session.has_working_dir()
    return data_paths(config) | ({"model.checkpoint": named} if is_elsewhere else {})


def with_absolute_paths(config: ConfigT) -> ConfigT:
    """Return a config whose plain paths are absolute, so that they do not depend on the working
    directory of a process; a checkpoint among the files of a job stays relative.
    """
    changed: dict[str, Section] = {
        "output": config.output.model_copy(update={"uri": absolute(config.output.uri)})
    }
    if "model.checkpoint" in worker_paths(config):
        changed["model"] = config.model.model_copy(
            update={"checkpoint": absolute(config.model.checkpoint)}
        )
    if isinstance(config, PredictConfig):
        changed["input"] = config.input.with_absolute_paths()
    else:
        parts = {name: part.with_absolute_paths() for name, part in config.data.parts.items()}
        changed["data"] = config.data.model_copy(update=parts)
    return config.model_copy(update=changed)


def is_shared(uri: str, storage: StorageConfig) -> bool:
    """Whether every node of any cluster sees a file where this machine does."""
    return is_remote(uri) or (storage.shared and Path(plain(uri)).is_absolute())


def require_shared(found: dict[str, str], storage: StorageConfig, nodes: int | None = None) -> None:
    """Refuse paths that workers cannot see: those of the connected cluster of ``nodes`` nodes, or
    without ``nodes`` those of any cluster.

    Raises ConfigError with the key of the first one.
    """
    for key, uri in found.items():
        if uri.startswith("memory://"):
            raise ConfigError(
                f"{key}: {uri} lives in one process; use an object store, or on one machine "
                "workers.count = 'inline'"
            )
        if is_shared(uri, storage) or (nodes is not None and (nodes < 2 or storage.shared)):
            continue
        if nodes is None and not Path(plain(uri)).is_absolute():
            raise ConfigError(
                f"{key}: {uri} is relative to a directory of this machine; write where the nodes "
                "of the cluster find it: an object store, or an absolute path that they share"
            )
        other = "" if nodes is None else f", and the cluster has {nodes} nodes"
        raise ConfigError(
            f"{key}: {uri} is a path of this machine{other}; use an object store, or set "
            "storage.shared = true if all nodes of the cluster see it there"
        )
