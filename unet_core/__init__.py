"""What is computed: U-Nets, tiling, decoding, parts and the run folder. Never imports Ray."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unet_core.networks.checkpoint import load_model as load_model
    from unet_core.runs.reader import open_run as open_run

_DOORS = {"load_model": "networks.checkpoint", "open_run": "runs.reader"}


def __getattr__(name: str) -> Any:
    """``load_model`` and ``open_run``, imported when they are first asked for."""
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"unet_core.{_DOORS[name]}"), name)
