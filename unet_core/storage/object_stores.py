"""Connections to object stores, and the meaning of their errors. Only ``store`` uses this.

Credentials are found by the store's own library; nothing here reads, keeps or prints one. Private
methods of s3fs and aiobotocore are called here alone, each with the reason beside it, and held to
new versions by ``tests/unet_core/storage/test_s3_internals.py``.
"""

import contextlib
import errno
import io
import logging
import os
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, BinaryIO, TypeVar, cast

import fsspec.asyn

from unet_core.config.sections import StorageConfig
from unet_core.errors import (
    ArchivedError,
    ChangedError,
    ForbiddenError,
    NotFoundError,
    StoreError,
)
from unet_core.storage.spool import FULL

ResultT = TypeVar("ResultT")
Info = dict[str, Any]
"""Name, type, size and etag of an object, or name and type of a prefix, as fsspec tells them."""

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0
"""Pauses between tries: short enough for a hiccup, long enough to spare a busy store."""
WAIT_UNTOLD_S = 3.0  # most stores answer at the second or third try; the next is within 10 s
WARNINGS_S = 30.0
"""Seconds between two warnings of a process that it waits for a store."""
_last_warning = {"at": -WARNINGS_S}
"""Time of the last one, on the monotonic clock."""
LARGE_BYTES = 64 * 2**20
"""Larger files are uploaded from disk in parts; smaller ones need one request."""
SLOWEST_BYTES_PER_S = 2**16
"""Slowest write that counts as progress; slower ones are given up and tried again."""
PAGE_KEYS = 1000
"""Keys in a page of a listing; S3 gives no more."""
BUSY = {errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ECONNRESET}
LIBRARIES = ("aiohttp", "azure", "botocore", "requests", "urllib3")
BUSY_ANSWERS = {"408", "429", "500", "502", "503", "504"}
REWRITTEN = "was written again since the run began"
NO_FILE = {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
"""Numbers of errors that, besides FileNotFoundError, say that a name is that of no file."""
ARCHIVED = {"InvalidObjectState", "BlobArchived"}
DENIED = {
    "403",  # an answer to HEAD has no body: it may be about the credentials
    "AccessDenied",
    "AllAccessDisabled",
    "AuthorizationFailure",
    "AuthorizationPermissionMismatch",
    "InvalidRequest",  # an object that is encrypted with a key of its owner (SSE-C)
    "KMS.DisabledException",
    "KMS.KMSInvalidStateException",
    "KMS.NotFoundException",
}
"""Codes of S3 and Azure for what may be true of one object, or of all."""
OBJECT_ADVICE: dict[tuple[type[StoreError], bool], str] = {
    (ArchivedError, True): "; restore it first (S3: aws s3api restore-object, Azure: its tier)",
    (ForbiddenError, True): "; check the credentials, and who may read it (policy, ACL, KMS key)",
    (ForbiddenError, False): "; let this user read it",
}
"""By the error, and whether the object lies in an object store."""
ABOUT_CREDENTIALS = {
    "400",  # an answer to HEAD has no body, so expired credentials are no more than this
    "AuthorizationHeaderMalformed",
    "InvalidToken",
    "TokenRefreshRequired",
}


def connect(uri: str, storage: StorageConfig) -> tuple[Any, str]:
    """The fsspec filesystem of a URI, and the path in it. Connects to nothing yet.

    Raises StoreError if the library for its protocol is not installed.
    """
    protocol = uri.partition("://")[0] if "://" in uri else "file"
    try:
        options = _s3_options(storage) if protocol == "s3" else {}
        fs, path = fsspec.core.url_to_fs(os.path.expanduser(uri), **options)
    except ImportError as error:
        extra = {"gs": "gcs", "abfs": "azure"}.get(protocol, protocol)
        raise StoreError(
            f"{protocol}:// needs a library: pip install 'unet-jobs[{extra}]'"
        ) from error
    except ValueError as error:
        raise StoreError(f"{uri}: not a path or URI that can be used: {error}") from error
    if protocol == "s3":
        fs.retries = 1  # our own deadline decides
        fs.split_path = partial(_split_path, fs)
    return fs, str(path)


def _split_path(fs: Any, path: str) -> tuple[str, str, None]:
    """Split a path of S3 into bucket and key; s3fs would cut the key at ``?versionId=``."""
    bucket, key, _ = type(fs).split_path(fs, path)
    return bucket, key and path.partition(f"{bucket}/")[2], None


def _s3_options(storage: StorageConfig) -> dict[str, Any]:
    role = {"session": _role_session(storage)} if storage.role else None
    return {
        "anon": storage.anonymous,
        "requester_pays": storage.requester_pays,
        "use_listings_cache": False,
        "max_concurrency": 1,  # one request a read: no size is asked for first
        "config_kwargs": {
            "retries": {"mode": "standard", "total_max_attempts": 1},  # persist asks again
            "connect_timeout": _cut_off_s(storage.deadline_s, 10),
            "read_timeout": _cut_off_s(storage.deadline_s, 60),
        },
        "client_kwargs": _said(endpoint_url=storage.endpoint_url, region_name=storage.region),
        "s3_additional_kwargs": _said(
            ServerSideEncryption=storage.encryption, SSEKMSKeyId=storage.kms_key
        ),
        **(role or _said(profile=storage.profile)),
    }


def _said(**options: str) -> dict[str, str]:
    """Drop empty options."""
    return {name: value for name, value in options.items() if value}


def write(fs: Any, path: str, source: BinaryIO, deadline_s: float, **how: Any) -> None:
    """Write an object whole; ``mode="create"``: raises FileExistsError if there is one.

    A large file on disk is uploaded to S3 in parts; anything else is held in memory. Raises
    TimeoutError without progress: time limits of the libraries begin when all is sent, so a
    store that accepts nothing would block them for ever.
    """
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    limit_s = _cut_off_s(deadline_s, 60) + size / SLOWEST_BYTES_PER_S
    try:
        if "s3" in fs.protocol and size > LARGE_BYTES and not isinstance(source, io.BytesIO):
            fsspec.asyn.sync(
                fs.loop,
                fs._put_file,  # put_file documents no time limit
                f"/dev/fd/{source.fileno()}",  # temporary files have no other name
                path,
                timeout=limit_s,
                **how,
            )
        elif getattr(fs, "async_impl", False):  # nor does pipe_file
            fsspec.asyn.sync(fs.loop, fs._pipe_file, path, source.read(), timeout=limit_s, **how)
        else:
            fs.pipe_file(path, source.read(), **how)
    except fsspec.FSTimeoutError as error:
        raise TimeoutError(f"{size} bytes were not taken in {limit_s:.0f} s") from error
    except OSError as error:
        # some stores refuse to create with a bare 412 that s3fs calls EINVAL
        if how and error.errno == errno.EINVAL and fs.exists(path):
            raise FileExistsError(path) from error
        raise


def _cut_off_s(deadline_s: float, most_s: float) -> float:
    """Compute the seconds without an answer that end a request, so that another fits before the
    deadline.
    """
    return min(most_s, max(1.0, deadline_s / 4))


def _role_session(storage: StorageConfig) -> Any:
    """Make a session with the credentials of a role, renewed before they expire."""
    from aiobotocore import credentials
    from aiobotocore.session import AioSession

    own = AioSession(profile=storage.profile or None)
    endpoint = _said(endpoint_url=storage.endpoint_url, region_name=storage.region)

    async def assume() -> Any:
        client = own.create_client("sts", **endpoint)  # can be entered once
        return await credentials.create_assume_role_refresher(
            client, {"RoleArn": storage.role, "RoleSessionName": "unet-jobs"}
        )()

    session = AioSession()
    # nothing public gives a session credentials that are renewed
    session._credentials = credentials.AioDeferredRefreshableCredentials(assume, "assume-role")
    return session


def read_if_match(fs: Any, path: str, start: int | None, stop: int | None, etag: str) -> bytes:
    """Read bytes [start, stop) of an S3 object at once; raises ChangedError for another ETag."""

    async def read() -> bytes:
        # cat_file knows no If-Match, and call_s3 gives a body that only the loop of fs can read
        bucket, key, _ = fs.split_path(path)
        wanted = {} if start is None or stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        found = await fs._call_s3(
            "get_object", Bucket=bucket, Key=key, IfMatch=f'"{etag}"', **wanted, **fs.req_kw
        )
        with contextlib.closing(found["Body"]) as body:
            return bytes(await body.read())

    try:
        return cast(bytes, fsspec.asyn.sync(fs.loop, read))
    except OSError as error:
        if _code(error) in ("412", "PreconditionFailed"):
            raise ChangedError(f"{fs.unstrip_protocol(path)} {REWRITTEN}") from error
        raise


def one_page(fs: Any, path: str) -> dict[str, dict[str, Info]] | None:
    """Ask S3 for all keys below a prefix: what ``ls`` would give for each folder, by its path.

    None if they are more than one page.
    """
    # ls makes a request for each folder, and find one for each page, however many
    found, token = _page(fs, path, MaxKeys=PAGE_KEYS)
    if token:
        return None
    folders: dict[str, dict[str, Info]] = {path: {}}
    for info in found:
        *above, name = accumulate(
            info["name"][len(path) + 1 :].split("/"), "{}/{}".format, initial=path
        )
        for folder, inner in pairwise(above):
            folders[folder][f"{inner}/"] = {"name": inner, "type": "directory"}
            folders.setdefault(inner, {})
        folders[above[-1]][name] = info
    return folders


def one_level(fs: Any, path: str) -> list[Info]:
    """Ask S3 for what is directly below a prefix; ``ls`` cannot name those that end with ``//``."""
    found, token = _page(fs, path, Delimiter="/")
    while token:
        more, token = _page(fs, path, Delimiter="/", ContinuationToken=token)
        found += more
    return found


def _page(fs: Any, path: str, **how: Any) -> tuple[list[Info], str | None]:
    """Ask S3 for a page of keys and prefixes below a prefix, and for what asks for the next one."""
    bucket, _, _ = fs.split_path(path)
    prefix = "" if path == bucket else f"{path[len(bucket) + 1 :]}/"
    # s3fs says of call_s3, a public name, no more than of _call_s3
    answer = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **how, **fs.req_kw)
    found = [
        {"name": f"{bucket}/{below['Prefix'][:-1]}", "type": "directory"}
        for below in answer.get("CommonPrefixes", [])
    ] + [
        info | {"name": f"{bucket}/{info['Key']}", "type": "file", "size": info["Size"]}
        for info in answer.get("Contents", [])
    ]
    return found, answer.get("NextContinuationToken")


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: store busy, unreachable or cut off."""
    if isinstance(error, FileNotFoundError | FileExistsError) or _is_refused(error):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    answers = (getattr(error, name, None) for name in ("status_code", "status", "code"))
    if answer := next(filter(None, answers), None):  # of Azure, aiohttp, Google
        return str(answer) in BUSY_ANSWERS
    if type(error).__module__.partition(".")[0] in LIBRARIES:
        # some of these are OSErrors without a number
        return "SSLError" not in type(error).__name__ and not _is_about_credentials(error)
    is_cut_off = isinstance(error.__cause__, ConnectionError)
    return isinstance(error, OSError) and (error.errno in BUSY or is_cut_off)


def _is_about_credentials(error: BaseException) -> bool:
    from botocore import exceptions

    return isinstance(
        error,
        exceptions.NoCredentialsError
        | exceptions.PartialCredentialsError
        | exceptions.CredentialRetrievalError
        | exceptions.ProfileNotFound
        | exceptions.SSOError
        | exceptions.TokenRetrievalError
        | exceptions.NoRegionError
        | exceptions.ParamValidationError
        | exceptions.ClientError,
    )


def retry_transient(
    call: Callable[[], ResultT], verb: str, where: str, deadline_s: float
) -> ResultT:
    """Call, and try again with growing pauses while the error is transient, until the deadline.

    Raises FileExistsError, ObjectError as ``as_store_error`` gives it, StoreError for the rest.
    """
    began, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return call()
        except (FileExistsError, ChangedError):
            raise
        except Exception as error:  # the libraries of the stores share no base class
            if not is_transient(error):
                raise as_store_error(verb, where, error) from error
            waited_s = time.monotonic() - began
            if waited_s + pause > deadline_s:
                raise StoreError(
                    f"cannot {verb} {where}: tried for {deadline_s:g} s, last: {_reason(error)}; "
                    "the same command continues once the store answers"
                ) from error
            if waited_s > WAIT_UNTOLD_S:
                _warn_of_waiting(f"cannot {verb} {where}: {_reason(error)}", deadline_s - waited_s)
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _warn_of_waiting(problem: str, left_s: float) -> None:
    """Log what is waited for; one warning for all threads in ``WARNINGS_S``."""
    if time.monotonic() - _last_warning["at"] > WARNINGS_S:
        _last_warning["at"] = time.monotonic()
        log.warning("%s; trying again for %.0f s", problem, left_s)


def as_store_error(verb: str, where: str, error: BaseException) -> StoreError:
    """Convert a permanent error to a StoreError that tells the next step: to an ObjectError if it
    may be true of this object alone.
    """
    kind = _kind(verb, error)
    if kind is NotFoundError or isinstance(error, FileNotFoundError):
        return kind(f"cannot {verb} {where}: there is no such file, folder or bucket")
    advice = OBJECT_ADVICE.get((kind, "://" in where)) or _advice(verb, where, error)
    return kind(f"cannot {verb} {where}: {_reason(error)}{advice}")


def _kind(verb: str, error: BaseException) -> type[StoreError]:
    code, number = _code(error), getattr(error, "errno", None)
    is_missing = isinstance(error, FileNotFoundError) or (number in NO_FILE and verb != "remove")
    if is_missing and verb != "write":  # then a bucket is missing
        return NotFoundError
    if verb in ("list", "remove", "write"):
        return StoreError
    if code in ARCHIVED:
        return ArchivedError
    is_denied = code in DENIED or (isinstance(error, PermissionError) and not code)
    return ForbiddenError if is_denied else StoreError


def _is_refused(error: BaseException) -> bool:
    """Whether the store says no, and will again; s3fs knows only some of these codes."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return isinstance(error, PermissionError) or status in (401, 403) or _code(error) in DENIED


def _advice(verb: str, where: str, error: BaseException) -> str:
    number = getattr(error, "errno", None)
    if "://" in where and (_is_refused(error) or _code(error) in ABOUT_CREDENTIALS):
        return (
            "; check the credentials, whether a token expired, the bucket's policy and "
            "storage.region; then the same command continues"
        )
    if number in FULL:
        return "; make room there, then the same command continues"
    if verb == "write" and number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "; let this user write there, then the same command continues"
    if _is_about_credentials(error):
        return (
            "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, storage.profile, or "
            "storage.anonymous = true for a public bucket"
        )
    return ""


def _code(error: BaseException) -> str:
    """Return the error code of S3 or Azure; empty for other errors."""
    code = _response(error).get("Error", {}).get("Code") or getattr(error, "error_code", "")
    return str(getattr(code, "value", code) or "")


def _response(error: BaseException) -> dict[str, Any]:
    response = getattr(error.__cause__, "response", None)
    return response if isinstance(response, dict) else {}


def _reason(error: BaseException) -> str:
    said = error.args[-1] if error.args else None  # None, where a store gives no message
    text = said if isinstance(said, str) else _code(error) or str(error)
    return " ".join((text or type(error).__name__).split())[:300]
