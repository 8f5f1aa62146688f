"""The files of a submitted job: its config, and local files that the config names."""

import hashlib
import logging
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from jobs.backends.paths import data_paths, is_shared, require_shared
from unet_core.config.predict import PredictConfig
from unet_core.config.train import TrainConfig
from unet_core.config.uris import plain
from unet_core.errors import ConfigError

MOST_BYTES = 100 * 10**6
CONFIG = "job.toml"


@dataclass(frozen=True)
class Package:
    """Files of a job, by their names in its working directory, and its command."""

    verb: str
    files: dict[str, Path]
    overrides: list[str]
    flags: tuple[str, ...]
    """Flags of the verb, such as ``--refresh``."""

    @property
    def entrypoint(self) -> str:
        """Return the command line of the job."""
        verbose = ["-v"] if logging.getLogger().isEnabledFor(logging.INFO) else []
        return shlex.join(["unet-jobs", *verbose, self.verb, CONFIG, *self.overrides, *self.flags])

    def digest(self, config: PredictConfig | TrainConfig) -> str:
        """Return a digest of config, flags and contents of files."""
        digest = hashlib.sha256(config.model_dump_json().encode())
        digest.update("\0".join(self.flags).encode())
        for name, path in sorted(self.files.items()):
            if name != CONFIG:
                digest.update(f"\0{name}\0".encode())
                digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write links to the files."""
        for name, path in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path)


def pack(
    verb: str,
    path: str,
    overrides: list[str],
    config: PredictConfig | TrainConfig,
    flags: tuple[str, ...] = (),
) -> Package:
    """Find what a job needs of this machine: TOML, a local checkpoint, the module of a factory.

    Raises ConfigError for paths that the cluster cannot see and for files that are too large.
    """
    require_shared(data_paths(config), config.storage)
    files, overrides = {CONFIG: Path(path).resolve()}, list(overrides)
    checkpoint = config.model.checkpoint
    is_builtin = not checkpoint or checkpoint.startswith("builtin:")
    if not is_builtin and not is_shared(checkpoint, config.storage):
        local = Path(plain(checkpoint)).expanduser()
        if not local.is_file():
            raise ConfigError(f"model.checkpoint: {checkpoint} is no file of this machine")
        files[local.name] = local.resolve()
        overrides.append(f"model.checkpoint={local.name}")
    files |= _module(config.model.factory)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        raise ConfigError(
            f"the job would take {total / 1e6:.1f} MB along, at most {MOST_BYTES / 1e6:.0f} MB are "
            "allowed; the largest files:\n"
            + "\n".join(f"  {sizes[name] / 1e6:10.1f} MB  {files[name]}" for name in largest)
            + "\nput them into the image of the cluster, or a checkpoint into an object store"
        )
    return Package(verb, files, overrides, flags)


def _module(factory: str) -> dict[str, Path]:
    """Return the files of the factory's top module or package, if it is in this directory."""
    top = re.split("[.:]", factory)[0]
    found = [Path(f"{top}.py"), *Path(top).rglob("*")] if top else []
    return {
        path.as_posix(): path.resolve()
        for path in found
        if path.is_file() and not {"__pycache__", ".git", ".venv"} & set(path.parts)
    }
