"""``unet-jobs submit``: the same command on a cluster, under one name for each run folder.

The name is a digest of the path of the run, so a run never gets two drivers by mistake: submitted
again, it is followed if its job is alive, and continued by a new job if that one has ended.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp
import requests

from jobs.backends import session
from jobs.submission.package import Package
from unet_core.config.predict import PredictConfig
from unet_core.config.train import TrainConfig
from unet_core.config.uris import plain
from unet_core.errors import ConfigError, StoppedError, WorkersError

if TYPE_CHECKING:
    from ray.job_submission import JobInfo

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
PATIENCE_S = 600.0
"""Seconds that a cluster may be unreachable before its job is no longer followed."""
AGAIN_S = 2.0
REQUEST_S = (5.0, 20.0)
"""Seconds to connect, and seconds of silence, after which a request has failed: a job server with
many jobs takes some seconds to answer."""
STOP_WAIT_S = 120
"""Seconds that a stopped job gets to end by itself: a training saves a checkpoint."""
CHATTERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
BROKEN = (aiohttp.ClientError, requests.RequestException, ConnectionError)
SILENCE_S = 120.0
"""Seconds without a line after which a connection is opened again: progress comes every minute."""

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


def stop_command(address: str, job_id: str) -> str:
    """Return the command line that asks a job to end, for a shell like that of this process."""
    has_token = os.environ.get("RAY_AUTH_MODE") == "token"
    return f"{'RAY_AUTH_MODE=token ' * has_token}ray job stop --address {address} {job_id}"


def run_name(verb: str, config: PredictConfig | TrainConfig) -> str:
    """Return the id of a run's first job: verb, last part of its path, digest of its path."""
    uri = plain(config.output.uri).rstrip("/")
    place = f"{config.storage.endpoint_url}\0{uri}"
    word = re.sub(r"[^A-Za-z0-9]+", "-", uri.rpartition("/")[2]).strip("-")[:40]
    return f"{verb}-{word}-{hashlib.sha256(place.encode()).hexdigest()[:10]}"


class UnknownError(WorkersError):
    """The cluster does not know the job."""


class TakenError(WorkersError):
    """The cluster has a job of this id already."""


@dataclass(frozen=True)
class Submitted:
    """A job of a run on a cluster."""

    id: str
    is_new: bool
    """False if the job was alive already."""
    before: str = ""
    """End state of the previous job of the run."""


class JobServer:
    """The job server of a cluster. Methods raise WorkersError if it refuses or is unreachable."""

    def __init__(self, address: str, client: Any = None, patience_s: float = PATIENCE_S) -> None:
        self.address, self._patience_s = address, patience_s
        session.use_auth_token()
        self.client = client or self._connected()

    def _connected(self) -> Any:
        """Create Ray's client; it prefers addresses of the environment to its argument, and waits
        for ever for an answer unless its requests are given a limit.
        """
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):  # type: ignore[misc]
            _do_request = partialmethod(JobSubmissionClient._do_request, timeout=REQUEST_S)

        if not logging.getLogger().isEnabledFor(logging.INFO):
            for name in CHATTERS:
                logging.getLogger(name).setLevel(logging.WARNING)
        hidden = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
        try:
            return self._ask(lambda: Client(self.address), patience_s=0)
        finally:
            os.environ.update(hidden)

    def submit(self, name: str, package: Package, config: PredictConfig | TrainConfig) -> Submitted:
        """Start a job for a run, or find the one that is alive.

        Raises ConfigError if that one has another config or other files.
        """
        digest = package.digest(config)
        jobs = self._jobs_of(name)
        last, found = max(jobs, default=0), _alive(jobs)
        if found is None:
            job_id = f"{name}-{last + 1}" if last else name
            with contextlib.suppress(TakenError):
                self._start(job_id, package, {"run": config.output.uri, "config": digest})
                ended = f"{jobs[last].submission_id} ended as {jobs[last].status}" if last else ""
                return Submitted(job_id, True, ended)
            found = _alive(self._jobs_of(name))  # somebody else did, just now
        if found is None:
            raise WorkersError(f"{name}: another job of this run has just ended; submit it again")
        if (found.metadata or {}).get("config") != digest:
            raise ConfigError(
                f"job {found.submission_id} is at work on {config.output.uri} with another config "
                "or other files; wait for it, or stop it: "
                + stop_command(self.address, found.submission_id)
            )
        return Submitted(found.submission_id, is_new=False)

    def _jobs_of(self, name: str) -> dict[int, Any]:
        """Return all jobs of a run that the cluster knows, by their numbers from 1."""
        pattern = re.compile(rf"{re.escape(name)}(?:-(\d+))?")
        jobs = self._ask(self.client.list_jobs)
        found = ((pattern.fullmatch(job.submission_id or ""), job) for job in jobs)
        return {int(match[1] or 1): job for match, job in found if match is not None}

    def info(self, job_id: str) -> "JobInfo":
        """Return the state of a job."""
        try:
            return self._ask(lambda: self.client.get_job_info(job_id))
        except UnknownError as error:
            raise WorkersError(
                f"{self.address} knows no job {job_id}: its head was restarted; the same command "
                "submits the run again, and it continues"
            ) from error

    def stop(self, job_id: str) -> None:
        """Ask a job to end; it has ``STOP_WAIT_S`` to do so by itself."""
        self._ask(lambda: self.client.stop_job(job_id))

    def _start(self, job_id: str, package: Package, metadata: dict[str, str]) -> None:
        """Upload and start; raises TakenError if the id has just been taken."""
        with tempfile.TemporaryDirectory() as folder:
            package.write(Path(folder))
            self._ask(
                lambda: self.client.submit_job(
                    entrypoint=package.entrypoint,
                    submission_id=job_id,
                    runtime_env={
                        "working_dir": folder,
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
                    },
                    metadata=metadata,
                )
            )

    def _ask(self, call: Callable[[], ResultT], patience_s: float | None = None) -> ResultT:
        from ray.exceptions import AuthenticationError  # reads the environment when it comes

        patience_s = self._patience_s if patience_s is None else patience_s
        deadline, is_told = time.monotonic() + patience_s, False
        while True:
            try:
                return call()
            except AuthenticationError as error:
                raise WorkersError(
                    f"{self.address} wants another token: set RAY_AUTH_TOKEN or "
                    "RAY_AUTH_TOKEN_PATH to the one of the cluster, or write it to "
                    f"~/{session.TOKEN}"
                ) from error
            except BROKEN as error:
                failure = WorkersError(
                    f"no Ray job server at {self.address}: {_short(error)}; it is the address of "
                    "the dashboard, e.g. http://localhost:8265"
                )
            except RuntimeError as error:  # Ray's for any answer that is not 200
                said, failure = str(error), WorkersError(f"{self.address}: {_short(error)}")
                status = re.search(r"status code (\d{3})", said)
                code = int(status[1]) if status else 0
                if "already exists" in said:
                    raise TakenError(said) from error
                if code == 404:
                    raise UnknownError(str(failure)) from error
                if code < 500:
                    raise failure from error
            if time.monotonic() >= deadline:
                raise failure
            if not is_told:
                log.warning("%s; trying again for %.0f s", failure, deadline - time.monotonic())
                is_told = True
            time.sleep(AGAIN_S)


class Follower:
    """Shows each line of a job's output once, across broken connections."""

    def __init__(self, server: JobServer, job_id: str, show: Callable[[str], None]) -> None:
        self._server, self._id, self._show = server, job_id, show
        self._seen = 0
        self._line = ""

    def follow(self) -> tuple[int, str]:
        """Show the output until the job ends; return its exit code and end state. May be called
        again after an interruption.

        Raises WorkersError if the cluster stays out of reach or has forgotten the job.
        """
        while True:
            with contextlib.suppress(*BROKEN, RuntimeError):  # the state is asked for below
                asyncio.run(self._tail())
            info = self._server.info(self._id)
            if info.status.is_terminal():
                with contextlib.suppress(*BROKEN, RuntimeError):  # what was lost is only text
                    self._take(0, self._server.client.get_job_logs(self._id))
                self._take(self._seen, "\n" if self._line else "")  # a last line may not end
                return _exit_code(info), f"{self._id} ended as {info.status}"
            time.sleep(AGAIN_S)

    async def _tail(self) -> None:
        """Stream the output; each connection begins at the first line, so skip what was shown."""
        position, chunks = 0, self._server.client.tail_job_logs(self._id)
        with contextlib.suppress(StopAsyncIteration, TimeoutError):
            while True:
                chunk = await asyncio.wait_for(anext(chunks), SILENCE_S)
                self._take(position, chunk)
                position += len(chunk)

    def _take(self, position: int, text: str) -> None:
        new = text[max(0, self._seen - position) :]
        if not new:
            return
        self._seen = position + len(text)
        *lines, self._line = (self._line + new).split("\n")
        for line in lines:
            self._show(line)


def _alive(jobs: dict[int, Any]) -> Any | None:
    """Return the job that has not ended."""
    return next((job for job in jobs.values() if not job.status.is_terminal()), None)


def _exit_code(info: "JobInfo") -> int:
    """Return the exit code of an ended job: 130 if stopped, 1 if it was killed by a signal."""
    codes = {"SUCCEEDED": 0, "STOPPED": StoppedError.exit_code}
    return codes.get(info.status, max(1, info.driver_exit_code or 1))


def _short(error: BaseException) -> str:
    """Return the last line of a message that may be a traceback."""
    lines = [line for line in str(error).replace("\\n", "\n").splitlines() if line.strip(" .'\"}")]
    return lines[-1].strip(" .'\"}")[:300] if lines else type(error).__name__
