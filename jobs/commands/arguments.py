"""Configs from arguments: a file or plain paths, with overrides."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet_core.config.loading import build, load
from unet_core.config.predict import PredictConfig
from unet_core.config.sections import ConfigT, StorageConfig
from unet_core.config.train import TrainConfig
from unet_core.errors import ConfigError

if TYPE_CHECKING:
    from unet_core.runs.reader import Results

RECIPES = Path(__file__).parents[1] / "recipes"
"""Folder of the shipped recipes, found by name where no such file exists."""
OVERRIDES_METAVAR = "[SECTION.KEY=VALUE]..."
Arguments = tuple[str, ...]
ENVIRONMENT_KEYS = ("storage.", "workers.")
"""Keys that any command on a run may override."""


def predict_config(
    source: str, overrides: Arguments, model: str | None, out: str | None, default_output: str = ""
) -> PredictConfig:
    """Build the config of ``predict`` from a TOML or a folder of images.

    ``default_output``: used where ``out`` is empty.
    """
    if source.endswith(".toml"):
        if model or out:
            raise ConfigError(f"--model and --out go with IMAGES; {source} has keys for both")
        return load(PredictConfig, source, list(overrides))
    out = out or default_output
    if not out and not any(o.startswith("output.uri=") for o in overrides):
        raise ConfigError(f"predict {source}: say where the run goes with --out RUN")
    return from_arguments(
        PredictConfig,
        overrides,
        input={"uri": source},
        model={"checkpoint": model} if model else {},
        output={"uri": out} if out else {},
    )


def train_config(source: str, overrides: list[str], out: str | None) -> TrainConfig:
    """Build the config of ``train`` from a TOML, a recipe, or two folders."""
    if source.endswith(".toml"):
        if out:
            raise ConfigError(f"--out goes with IMAGES MASKS; {source} has output.uri")
        return load(TrainConfig, recipe(source), overrides)
    if not overrides or "=" in overrides[0] or not out:
        raise ConfigError("write: train IMAGES MASKS --out FOLDER, or: train CONFIG.toml")
    masks = overrides.pop(0)
    return from_arguments(
        TrainConfig,
        overrides,
        data={"train": {"uri": source, "masks": masks if "/" in masks else f"./{masks}"}},
        output={"uri": out},
    )


def from_arguments(kind: type[ConfigT], overrides: Sequence[str], **table: Any) -> ConfigT:
    """Build a config from a table of what plain arguments say, and overrides."""
    return build(kind, table, list(overrides), source="command line")


def recipe(path: str) -> str:
    """Return a path as it is, or that of the shipped recipe of that name."""
    shipped = RECIPES / path
    return str(shipped) if not Path(path).exists() and shipped.is_file() else path


def storage_of(overrides: Arguments) -> StorageConfig:
    """Build the storage section from overrides."""
    for override in overrides:
        if not override.startswith("storage."):
            raise ConfigError(f"{override}: only storage.key=value goes here")
    return from_arguments(
        PredictConfig, overrides, input={"uri": "input"}, output={"uri": "output"}
    ).storage


def stored_run(run: str, overrides: Arguments) -> "Results":
    """Open a run with the ``storage`` overrides among others."""
    from unet_core.runs.reader import open_run

    return open_run(run, storage_of(tuple(o for o in overrides if o.startswith("storage."))))


def run_config(results: "Results", overrides: Arguments, allowed: Arguments) -> PredictConfig:
    """Return the config of a run, with overrides of the keys, or sections (``workers.``), that are
    ``allowed``. ``[workers]`` begins at its defaults: the run may have been made elsewhere.

    Raises ConfigError for any other key.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not any(key == a or (a.endswith(".") and key.startswith(a)) for a in allowed):
            meant = [a for a in allowed if a.partition(".")[2] == key]
            if meant:
                raise ConfigError(f"{key}: did you mean {meant[0]}?")
            names = ", ".join(f"{a}*" if a.endswith(".") else a for a in allowed)
            raise ConfigError(f"{key} is as the run was made; what can be said here: {names}")
    table = results.config.model_dump(mode="json", exclude={"workers"})
    table["output"]["uri"] = results.run.uri
    return from_arguments(PredictConfig, overrides, **table)
