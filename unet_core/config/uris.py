"""URIs that a config may name, and how they relate to paths of this machine."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
)

from unet_core.errors import ConfigError

AUTHORITY = re.compile(r"(\w+)://([^/]*)")
PROTOCOLS = ("file", "local", "memory", "s3", "gs", "abfs")


def allowed_uri(uri: str) -> str:
    """Refuse what fsspec would resolve but no job should: chains, parent steps, odd protocols,
    credentials (which no message repeats).
    """
    if not uri.strip():
        raise ValueError("is empty; give a path")
    if has_credentials(uri):
        raise ValueError("holds credentials; give them in the environment instead")
    if "::" in uri:
        raise ValueError(f"got {uri!r}, but chained URIs (::) are not allowed")
    protocol, separator, _ = uri.partition("://")
    if separator and protocol not in PROTOCOLS:
        raise ValueError(
            f"got {uri!r}, but {protocol}:// is not one of the protocols that are read; "
            f"allowed: plain paths, {', '.join(p + '://' for p in PROTOCOLS)}"
        )
    if separator and ".." in uri.split("/"):
        raise ValueError(f"got {uri!r}, but '..' is not allowed in a URI")
    return uri


def _allowed_or_known(name: str) -> str:
    return allowed_uri(name) if name and not name.startswith("builtin:") else name


Uri = Annotated[str, AfterValidator(allowed_uri)]
UriOrNone = Annotated[str, AfterValidator(_allowed_or_known)]
"""Empty, ``builtin:NAME``, or a URI."""


def has_credentials(uri: str) -> bool:
    """Whether a URI names a user before its host or bucket, also where a slash in the password cuts
    it short; ``abfs://container@account`` and access points (``s3://arn:…``) are none.
    """
    for protocol, authority in AUTHORITY.findall(uri):
        user, at, _ = authority.rpartition("@")
        if protocol in ("file", "local", "memory") or authority.startswith("arn:"):
            continue
        if ":" in (user if at else authority) or (at and protocol != "abfs"):
            return True
    return False


def is_remote(uri: str) -> bool:
    """Whether a URI is no path of a file system."""
    return "://" in uri and not uri.startswith(("file://", "local://"))


def plain(uri: str) -> str:
    """A local URI as a path; any other as it is."""
    return uri.removeprefix("file://").removeprefix("local://")


def absolute(uri: str) -> str:
    """A local URI as a path from the root; any other as it is."""
    return uri if is_remote(uri) else os.path.abspath(os.path.expanduser(plain(uri)))


def refuse_nesting(name: str, uri: str, read: dict[str, str]) -> None:
    """Output inside input would be read as input on the next run, and the other way round.

    ``read``: by the keys of a config. Raises ConfigError.
    """
    for key, other in read.items():
        path, root = (
            Path(p) if is_remote(p) else Path(plain(p)).expanduser().resolve() for p in (uri, other)
        )
        if path == root or root in path.parents or path in root.parents:
            raise ConfigError(f"{name} ({uri}) and {key} ({other}) must not contain each other")
