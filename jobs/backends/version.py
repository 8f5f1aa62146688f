"""The code version of a process: version and digest of the sources, equal on all nodes."""

import hashlib
from functools import lru_cache
from pathlib import Path

import jobs
import unet_core
from unet_core.errors import WorkersError


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return version and digest of this process: SHA-256 over all modules of ``jobs`` and
    ``unet_core``, cut to 12 hex digits.
    """
    digest = hashlib.sha256()
    for package in (jobs, unet_core):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{root.name}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return f"unet-jobs {unet_core.__version__} (sources {digest.hexdigest()[:12]})"


def require_same_code(driver: str, other: str, where: str) -> None:
    """Refuse to work with other code than the driver's; raises WorkersError that names both."""
    if driver != other:
        raise WorkersError(
            f"{where} runs {other}, the driver {driver}; give every node the same image, and "
            "upload no copy of jobs or unet_core with a job"
        )
