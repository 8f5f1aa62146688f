"""Addresses that name no cluster end a command within seconds, in one sentence."""

import contextlib
import http.server
import socket
import threading

import pytest

from jobs.backends import session
from unet_core.errors import WorkersError


@contextlib.contextmanager
def closed():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield port


@contextlib.contextmanager
def silent():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@contextlib.contextmanager
def web_server():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (closed, "no Ray cluster at 127.0.0.1:.*refused; start one there"),
        (silent, "no Ray cluster at 127.0.0.1:.*timed out; start one there"),
        (web_server, "is not the head of a Ray cluster, whose port is 6379"),
    ],
)
def test_an_address_without_a_cluster_is_told_within_seconds(at, said, monkeypatch):
    monkeypatch.setattr(session, "CONNECT_S", 0.3)
    with at() as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(WorkersError, match=f"RAY_ADDRESS: .*{said}"), session.connected():
            pass


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("no-such-host.invalid:6379", "no Ray cluster at no-such-host.invalid:6379: .*unset"),
        ("http://127.0.0.1:8265", "is the address of a job server; give it to `unet-jobs submit"),
    ],
)
def test_an_address_of_something_else_is_told(address, said, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(WorkersError, match=f"RAY_ADDRESS: .*{said}"), session.connected():
        pass
