"""The code version of a process: version and digest of the sources, equal on all nodes."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jobs
import unet_core
from unet_core.errors import WorkersError


@dataclass(frozen=True)
class CodeVersion:
    """Version of unet-jobs and digest of its sources."""

    version: str
    digest: str
    """SHA-256 over all modules of ``jobs`` and ``unet_core``, cut to 12 hex digits."""

    def __str__(self) -> str:
        return f"unet-jobs {self.version} (sources {self.digest})"

    def require(self, other: "CodeVersion", where: str) -> None:
        """Refuse to work with other code; raises WorkersError that names both."""
        if self != other:
            raise WorkersError(
                f"{where} runs {other}, the driver {self}; give every node the same image, and "
                "upload no copy of jobs or unet_core with a job"
            )


@lru_cache(maxsize=1)
def code_version() -> CodeVersion:
    """Code version of this process."""
    digest = hashlib.sha256()
    for package in (jobs, unet_core):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{root.name}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return CodeVersion(unet_core.__version__, digest.hexdigest()[:12])
