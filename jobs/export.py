"""``unet-jobs export``: what a run holds, in the forms that other programs read."""

from unet_core.config import StorageConfig
from unet_core.errors import ConfigError
from unet_core.networks import checkpoint
from unet_core.networks.onnx_export import to_onnx
from unet_core.run import open_existing
from unet_core.storage.store import Store, split


def export_onnx(source: str, out: str, storage: StorageConfig, factory: str = "") -> int:
    """Write the network of a checkpoint, or of the run that used it; returns its bytes.

    Raises CheckpointError if the run's checkpoint is no longer the one that it used.
    """
    sha256 = None
    if not source.endswith(".safetensors") and not source.startswith("builtin:"):
        _, record = open_existing(source, storage)
        source, sha256 = record.config["model"]["checkpoint"], record.identity["model.sha256"]
    network, header = checkpoint.load(source, sha256, storage, factory)
    folder, name = split(out)
    store = Store(folder, storage)
    if store.exists(name):
        raise ConfigError(f"{out} exists; choose another name")
    data = to_onnx(network, header)
    store.publish(name, data)
    return len(data)
