import pytest
import requests
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
    SSLError,
)

from unet_core.errors import StoreError
from unet_core.storage import object_stores
from unet_core.storage.object_stores import is_transient, retry_transient


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
        (22, "InvalidRequest", None, r"InvalidRequest$"),
        (16, "SlowDown", None, r"tried for 0 s, last: SlowDown; the same command continues"),
    ],
)
def test_a_refusal_is_told_by_its_code_where_the_store_says_no_more(number, code, message, told):
    error = OSError(number, message)
    error.__cause__ = ClientError({"Error": {"Code": code}}, "HeadObject")
    with pytest.raises(StoreError, match=told):
        retry_transient(failing([error]), "look at", "s3://b/x", 0)
