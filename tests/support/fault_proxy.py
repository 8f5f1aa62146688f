"""A TCP proxy in front of an object store that does to its requests what networks and stores do.

It runs on a thread of its own. ``Host`` passes unchanged, so signatures stay valid; ``Expect:
100-continue`` is forwarded, answer and all. What happens to a request, the first ``Rule`` that
matches says; requests that none matches pass as they are.
"""

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

REFUSALS = {
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "internal error": (500, "InternalError", "We encountered an internal error."),
    "expired token": (400, "ExpiredToken", "The provided token has expired."),
    "refresh": (400, "TokenRefreshRequired", "The provided token must be refreshed."),
    "unknown key": (403, "InvalidAccessKeyId", "The AWS Access Key Id does not exist."),
    "wrong key": (403, "SignatureDoesNotMatch", "The request signature does not match."),
    "unknown token": (403, "InvalidClientTokenId", "The security token is invalid."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "archived": (403, "InvalidObjectState", "It is not valid for the object's storage class"),
}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
PIECE = 2**16


@dataclass
class Rule:
    """What happens to some of the requests that match ``method`` and ``path`` (expressions).

    ``fault`` is a key of ``REFUSALS``, or one of

    - ``reset``: the connection is reset before anything is answered; ``cut``: it ends
    - ``reset inside``, ``cut inside``, ``reset after``: the same in the middle of the body, or
      behind it: the body of a PUT, which then never reaches the store, else that of the answer
    - ``stall``: the answer stops for ``seconds``, in its middle if it has a body, then goes on
    - ``silence``: for ``seconds`` it is not read and not answered, then passed on
    - ``lost answer``: the store does what it was asked, and the connection is reset
    - ``refuse``: for ``seconds``, nobody listens
    - ``none``: it is counted, and passes; after ``before`` was called, if there is one
    """

    method: str
    path: str
    fault: str
    first: int = 1
    last: float = 1
    seconds: float = 0.0
    before: Callable[[str], object] | None = None
    seen: int = 0
    """Requests that matched."""
    hits: int = 0
    """Those that the fault happened to."""

    def matches(self, method: str, path: str) -> bool:
        """Whether the rule is about a request; ``path`` has its query."""
        return bool(re.fullmatch(self.method, method) and re.search(self.path, path))

    def strikes(self) -> bool:
        """Count a request that matched; whether its turn has come."""
        self.seen += 1
        strikes = self.first <= self.seen <= self.last
        self.hits += strikes
        return strikes


class FaultProxy:
    """Passes requests on to ``target`` (``http://host:port``), and tells ``on_request`` of them."""

    def __init__(
        self, target: str, on_request: Callable[[str, str], object] = lambda method, path: None
    ) -> None:
        self._on_request = on_request
        parts = urlsplit(target)
        self._target = parts.hostname, parts.port
        self.rules: list[Rule] = []
        self.requests: list[tuple[str, str]] = []
        """Method and path, with its query, of everything that was asked."""
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy")

    @contextlib.contextmanager
    def running(self) -> Iterator["FaultProxy"]:
        """Listens while the block runs."""
        self._thread.start()
        try:
            self._call(self._listen())
            yield self
        finally:
            self._call(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def use(self, *rules: Rule) -> None:
        """These and no others, from now on; nothing is counted yet."""
        self.rules = list(rules)
        self.requests.clear()

    def _call(self, work) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _refuse(self, seconds: float) -> None:
        if not self._server.is_serving():
            return
        self._server.close()
        await asyncio.sleep(seconds)
        await self._listen()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, request after request; an end of any kind ends both sides of it."""
        task = asyncio.current_task()
        self._tasks.add(task)
        client = _Side(reader, writer)
        try:
            while await self._answer(client):
                pass
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            client.close()
            self._tasks.discard(task)

    async def _answer(self, client: "_Side") -> bool:
        """One request; whether another may follow on its connection."""
        head = _Head(await client.reader.readuntil(b"\r\n\r\n"))
        method, path = head.start.split(" ")[:2]
        self.requests.append((method, path))
        self._on_request(method, path)
        rule = next((rule for rule in self.rules if rule.matches(method, path)), None)
        fault = rule.fault if rule is not None and rule.strikes() else ""
        if fault == "silence":
            await asyncio.sleep(rule.seconds)
        elif fault == "none" and rule.before is not None:
            await asyncio.to_thread(rule.before, path)
        elif fault in REFUSALS:
            client.writer.write(_refusal(method, *REFUSALS[fault]))
            await client.writer.drain()
            return False
        elif fault in ("reset", "cut", "refuse"):
            if fault == "refuse":
                self._tasks.add(asyncio.create_task(self._refuse(rule.seconds)))
            client.close(by_reset=fault != "cut")
            return False
        elif method == "PUT" and fault in ("reset inside", "cut inside", "reset after"):
            if head.expects:
                client.writer.write(CONTINUE)
            share = 1 if fault == "reset after" else 2
            await client.reader.readexactly(head.length // share)
            client.close(by_reset=fault != "cut inside")
            return False
        store = _Side(*await asyncio.open_connection(*self._target))
        try:
            return await self._pass_on(head, client, store, fault, rule)
        finally:
            store.close()

    async def _pass_on(self, head, client: "_Side", store: "_Side", fault: str, rule) -> bool:
        store.writer.write(head.raw[:-2] + b"Connection: close\r\n\r\n")
        if not head.expects:
            await _copy(client, store, head.length)
        answer = _Head(await store.reader.readuntil(b"\r\n\r\n"))
        while " 100 " in answer.start:  # some servers say it twice
            if head.expects:
                client.writer.write(answer.raw)
                await _copy(client, store, head.length)
                head.expects = False
            answer = _Head(await store.reader.readuntil(b"\r\n\r\n"))
        has_body = not head.start.startswith("HEAD") and " 204 " not in answer.start
        length = answer.length if has_body else 0
        if fault == "lost answer":
            await store.reader.readexactly(max(0, length))
            client.close(by_reset=True)
            return False
        if fault == "stall" and not length:
            await asyncio.sleep(rule.seconds)
        client.writer.write(answer.raw)
        if fault in ("reset inside", "cut inside", "stall"):
            await _copy(store, client, length // 2)
            if fault != "stall":
                client.close(by_reset=fault == "reset inside")
                return False
            await asyncio.sleep(rule.seconds)
            length -= length // 2
        await _copy(store, client, length)
        if fault == "reset after":
            client.close(by_reset=True)
        return not (fault == "reset after" or head.expects or length < 0 or answer.is_last)


class _Head:
    """A request's or answer's first lines."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.start, _, fields = raw.decode("latin-1").partition("\r\n")
        pairs = [line.partition(":")[::2] for line in fields.lower().split("\r\n")]
        found = {name: value.strip() for name, value in pairs}
        self.expects = found.get("expect") == "100-continue"
        is_request = not self.start.startswith("HTTP/")
        self.length = int(found.get("content-length", 0 if is_request else -1))
        """Of the body; -1: until the connection ends."""
        self.is_last = found.get("connection") == "close"


class _Side:
    """One end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def close(self, by_reset: bool = False) -> None:
        connection = self.writer.get_extra_info("socket")
        if by_reset and not self.writer.is_closing():
            now = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        self.writer.close()


async def _copy(source: _Side, sink: _Side, length: int) -> None:
    """``length`` bytes, or all that come if it is -1."""
    while length:
        piece = await source.reader.read(min(PIECE, length) if length > 0 else PIECE)
        if not piece:
            if length > 0:
                raise EOFError
            break
        length -= len(piece) if length > 0 else 0
        sink.writer.write(piece)
        await sink.writer.drain()
    await sink.writer.drain()


def _refusal(method: str, status: int, code: str, message: str) -> bytes:
    """As S3 does it: the reason is in the body, and an answer to HEAD has none."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return (head + ("" if method == "HEAD" else body)).encode()
