import enum

import pytest
import requests
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
    SSLError,
    UnauthorizedSSOTokenError,
)
from s3fs.errors import translate_boto_error

from unet_core.errors import ArchivedError, ForbiddenError, NotFoundError, StoreError
from unet_core.storage import object_stores
from unet_core.storage.object_stores import as_store_error, is_transient, retry_transient


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """A clock that the pauses move, so that no test sleeps."""
    now = [0.0]
    monkeypatch.setattr(object_stores.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(object_stores.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    return now


def failing(errors):
    """A call that raises one error after the other, then answers."""
    left = list(errors)

    def call():
        if left:
            raise left.pop(0)
        return "answer"

    return call


def answer(kind, **told):
    error = kind("no")
    vars(error).update(told)
    return error


def refusal(status, code):
    """An answer of S3 as s3fs raises it."""
    told = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(told, "GetObject"))


BUSY = OSError(16, "Please reduce your request rate.")
AWAY = EndpointConnectionError(endpoint_url="http://store")


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (BUSY, True),
        (AWAY, True),
        (OSError(5, "502"), True),
        (OSError(121, "We encountered an internal error"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (ReadTimeoutError(endpoint_url="http://store"), True),
        (ConnectTimeoutError(endpoint_url="http://store"), True),
        (SSLError(endpoint_url="http://store", error="self-signed certificate"), False),
        (PermissionError("ExpiredToken"), False),
        (FileNotFoundError(), False),
        (FileExistsError(), False),
        (OSError(22, "Bad Request"), False),
        (NoCredentialsError(), False),
        (ValueError("a bug"), False),
        (refusal(403, "InvalidClientTokenId"), False),
        (refusal(400, "KMS.DisabledException"), False),
        (refusal(409, "ConditionalRequestConflict"), True),
        (refusal(429, "TooManyRequests"), True),
        (UnauthorizedSSOTokenError(), False),
        (answer(Exception, code=503), True),  # as gcsfs tells it
        (answer(Exception, code="429"), True),
        (answer(OSError, code=403), False),
        (answer(Exception, status_code=500), True),  # as Azure tells it
        (answer(Exception, status_code=409), False),
        (requests.ConnectionError("cut off"), True),
        (requests.exceptions.SSLError("self-signed certificate"), False),
    ],
)
def test_what_may_pass_is_told_from_what_will_not(error, transient):
    assert is_transient(error) is transient


def test_a_store_that_is_busy_for_a_while_is_asked_again(no_waiting):
    assert retry_transient(failing([BUSY, AWAY, BUSY]), "read", "s3://b/x", 60) == "answer"
    assert 0 < no_waiting[0] < 60


def test_a_store_that_stays_away_ends_at_the_deadline(no_waiting):
    with pytest.raises(StoreError, match=r"tried for 60 s, last: Please reduce.*same command"):
        retry_transient(failing([BUSY] * 1000), "read", "s3://b/x", 60)
    assert 30 < no_waiting[0] <= 60


def test_a_wait_for_a_store_is_said_within_ten_seconds_and_not_at_every_try(
    no_waiting, caplog, monkeypatch
):
    monkeypatch.setitem(object_stores._last_warning, "at", -1000.0)
    with pytest.raises(StoreError):
        retry_transient(failing([BUSY] * 1000), "read", "s3://b/x", 300)
    first, *others = caplog.messages
    assert "cannot read s3://b/x: Please reduce" in first
    assert int(first.removesuffix(" s").rpartition(" ")[2]) > 290
    assert 3 < len(others) < 11


def test_what_will_not_pass_is_asked_once(no_waiting):
    with pytest.raises(StoreError, match=r"cannot read s3://b/x: ExpiredToken; check the cred"):
        retry_transient(failing([PermissionError("ExpiredToken"), BUSY]), "read", "s3://b/x", 60)
    assert no_waiting[0] == 0


@pytest.mark.parametrize(
    ("number", "code", "message", "told"),
    [
        (22, "400", "Bad Request", r"Bad Request; check the credentials, whether a token expired"),
        (22, "InvalidToken", None, r"InvalidToken; check the credentials, whether a token expired"),
        (22, "MalformedXML", None, r"MalformedXML$"),
        (16, "SlowDown", None, r"tried for 0 s, last: SlowDown; the same command continues"),
    ],
)
def test_a_refusal_is_told_by_its_code_where_the_store_says_no_more(number, code, message, told):
    error = OSError(number, message)
    error.__cause__ = ClientError({"Error": {"Code": code}}, "HeadObject")
    with pytest.raises(StoreError, match=told):
        retry_transient(failing([error]), "look at", "s3://b/x", 0)


class Code(str, enum.Enum):  # noqa: UP042 # Azure's are none of StrEnum
    """As Azure has them."""

    BLOB_ARCHIVED = "BlobArchived"
    AUTHORIZATION_FAILURE = "AuthorizationFailure"


@pytest.mark.parametrize(
    ("error", "verb", "kind"),
    [
        (refusal(403, "InvalidObjectState"), "read", ArchivedError),
        (answer(Exception, status_code=409, error_code=Code.BLOB_ARCHIVED), "read", ArchivedError),
        (refusal(403, "AccessDenied"), "read", ForbiddenError),
        (refusal(403, "403"), "look at", ForbiddenError),
        (refusal(400, "KMS.DisabledException"), "read", ForbiddenError),
        (answer(Exception, status_code=403, error_code=Code.AUTHORIZATION_FAILURE), "read",
         ForbiddenError),
        (PermissionError(13, "Permission denied"), "open", ForbiddenError),
        (refusal(403, "AccessDenied"), "list", StoreError),
        (refusal(403, "AccessDenied"), "write", StoreError),
        (refusal(400, "ExpiredToken"), "read", StoreError),
        (refusal(403, "SignatureDoesNotMatch"), "read", StoreError),
        (refusal(400, "TokenRefreshRequired"), "read", StoreError),
        (IsADirectoryError(21, "Is a directory"), "read", NotFoundError),
        (OSError(36, "File name too long"), "read", NotFoundError),
        (OSError(36, "File name too long"), "write", StoreError),
        (OSError(5, "Input/output error"), "read", StoreError),
    ],
)  # fmt: skip
def test_what_one_object_may_suffer_is_told_by_code_from_what_a_store_suffers(error, verb, kind):
    assert type(as_store_error(verb, "s3://b/x", error)) is kind
    assert is_transient(error) is (str(error) == "[Errno 5] Input/output error")
