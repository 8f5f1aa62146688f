"""A real Ceph object store on loopback, the other one that the store suite runs against.

``make test-rgw`` uses it. It needs the daemons of Ceph, on Debian or Ubuntu (about 64 MB):

    apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-mgr ceph-common

Monitor, one OSD in memory, manager and gateway live in a temporary folder, speak to 127.0.0.1
alone and end with the session. Ready in about 20 s. As many stores, it wants the environment
variables that the target sets.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.support.fault_proxy import FaultProxy
from tests.support.s3 import BUCKET, S3

IS_ASKED_FOR = os.environ.get("UNET_JOBS_TEST_STORE") == "rgw"
"""``make test-rgw``."""


def moto_only(reason: str) -> pytest.MarkDecorator:
    """A test of what a real store does not have."""
    return pytest.mark.skipif(IS_ASKED_FOR, reason=reason)


PROGRAMS = ("ceph-mon", "ceph-osd", "ceph-mgr", "radosgw", "radosgw-admin", "ceph", "ceph-authtool")
COMMAND_S, READY_S, END_S = 60, 120, 20
KEY, SECRET = "testerkey", "testersecret"

CONFIG = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon}/0]
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {root}/keyring
run dir = {root}
pid file = {root}/$name.pid
log file = {root}/$name.log
admin socket = {root}/$name.asok
mon data = {root}/mon
osd data = {root}/osd
mgr data = {root}/mgr
rgw data = {root}/rgw
osd objectstore = memstore
memstore device bytes = 1073741824
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mgr initial modules =
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw thread pool size = 32
rgw enable usage log = false

[osd]
public addr = 127.0.0.1
cluster addr = 127.0.0.1

[mgr]
public addr = 127.0.0.1
"""
ENTITIES = {
    "mon.": ("mon",),
    "client.admin": ("mon", "osd", "mgr"),
    "osd.0": ("mon", "osd", "mgr"),
    "mgr.x": ("mon", "osd"),
    "client.rgw": ("mon", "osd", "mgr"),
}


@contextlib.contextmanager
def running() -> Iterator[S3]:
    """A store while the block runs; a proxy without rules notes what it is asked."""
    cluster = Rgw()
    try:
        s3 = cluster.start()

        def note(method: str, path: str) -> None:
            s3.requests.append((method, unquote(path.partition("?")[0])))

        with FaultProxy(s3.url, note).running() as proxy:
            s3.url = proxy.url
            yield s3
    finally:
        cluster.stop()


class Rgw:
    """One cluster of four processes."""

    def __init__(self) -> None:
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise RuntimeError(f"not installed: {', '.join(missing)}; see tests/support/rgw.py")
        # a short path, because sockets in it may have 107 characters
        self.root = Path(tempfile.mkdtemp(prefix="rgw-", dir="/tmp"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._config = self.root / "ceph.conf"
        self._gateway = _free_port()

    def start(self) -> S3:
        """Start everything, make the user and the bucket."""
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        self._config.write_text(
            CONFIG.format(fsid=fsid, mon=_free_port(), root=self.root, gateway=self._gateway)
        )
        self._write_keyring()
        for name in ("mon", "osd", "mgr", "rgw"):
            (self.root / name).mkdir()
        keyring = f"{self.root}/keyring"
        self._call("ceph-mon", "--mkfs", "-i", "a", "--keyring", keyring)
        self._spawn("ceph-mon", "-f", "-i", "a")
        self._call("ceph", "osd", "new", osd)
        self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._spawn("ceph-osd", "-f", "-i", "0")
        self._spawn("ceph-mgr", "-f", "-i", "x")
        user = (
            "--uid=tester",
            "--display-name=tester",
            f"--access-key={KEY}",
            f"--secret={SECRET}",
        )
        self._call("radosgw-admin", "user", "create", *user)
        self._spawn("radosgw", "-f", "-n", "client.rgw")
        s3 = S3(f"http://127.0.0.1:{self._gateway}", KEY, SECRET)
        deadline = time.monotonic() + READY_S
        while True:
            try:
                s3.client().create_bucket(Bucket=BUCKET)
                return s3
            except (BotoCoreError, ClientError):
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def stop(self) -> None:
        """End the processes, the last first, and drop what they kept."""
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
                continue
            process.kill()
            process.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def _write_keyring(self) -> None:
        lines = []
        for entity, services in ENTITIES.items():
            key = self._call("ceph-authtool", "--gen-print-key")
            lines += [f"[{entity}]", f"key = {key}"]
            lines += [f'caps {service} = "allow *"' for service in services]
        path = self.root / "keyring"
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o600)

    def _call(self, program: str, *arguments: str) -> str:
        command = ["timeout", str(COMMAND_S), program, "-c", str(self._config), *arguments]
        if program == "ceph-authtool":
            command = [program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def _spawn(self, program: str, *arguments: str) -> None:
        with (self.root / f"{program}.out").open("wb") as output:
            self._processes.append(
                subprocess.Popen(
                    [program, "-c", str(self._config), *arguments], stdout=output, stderr=output
                )
            )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
