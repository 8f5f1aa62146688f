"""Jobs on a cluster: what they take along, under which name, and how they are followed."""

import asyncio
import shutil
import socket
import threading
import time
from functools import partial
from types import SimpleNamespace

import aiohttp
import pytest
from click.testing import CliRunner

from jobs import cli
from jobs.backends import session
from jobs.backends.paths import require_shared, worker_paths
from jobs.predict import predict
from jobs.progress import FollowedProgress
from jobs.submission import job_server, package
from jobs.submission.job_server import Follower, JobServer, run_name
from jobs.submission.package import pack
from tests.support.data import digests, write_many_tars
from tests.support.runs import write_toml
from unet_core.config.loading import build
from unet_core.config.predict import PredictConfig
from unet_core.config.train import TrainConfig
from unet_core.errors import ConfigError, WorkersError


def config_of(kind=PredictConfig, **keys):
    tables = {
        PredictConfig: {"input": {"uri": "s3://b/in"}, "output": {"uri": "s3://b/runs/first"}},
        TrainConfig: {
            "data": {"train": {"uri": "s3://b/in", "masks": "s3://b/truth"}},
            "output": {"uri": "s3://b/models/mine"},
        },
    }
    table = tables[kind]
    for name, value in keys.items():
        section, _, key = name.rpartition("__")
        place = table
        for part in section.split("__"):
            place = place.setdefault(part, {})
        place[key] = value
    return build(kind, table, [])


def packed(tmp_path, config, overrides=()):
    path = tmp_path / "mine.toml"
    path.write_text("# the config")
    verb = "predict" if isinstance(config, PredictConfig) else "train"
    return pack(verb, str(path), list(overrides), config)


def test_a_job_takes_its_config_along_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "large.bin").write_bytes(b"0" * 1000)
    made = packed(tmp_path, config_of(), ["tile.size=512", "input.allow=['s3://x y']"])
    assert made.entrypoint == "unet-jobs predict job.toml tile.size=512 'input.allow=['\"'\"'" + (
        "s3://x y'\"'\"']'"
    )
    (tmp_path / "laid").mkdir()
    made.write(tmp_path / "laid")
    assert [p.name for p in (tmp_path / "laid").iterdir()] == ["job.toml"]
    assert (tmp_path / "laid" / "job.toml").read_text() == "# the config"


def test_a_local_checkpoint_and_the_factory_s_module_go_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "mine.safetensors").write_bytes(b"weights")
    (tmp_path / "my_models" / "__pycache__").mkdir(parents=True)
    for name in ("__init__.py", "nets.py", "__pycache__/nets.pyc"):
        (tmp_path / "my_models" / name).touch()
    config = config_of(
        model__checkpoint="weights/mine.safetensors", model__factory="my_models.nets:make"
    )
    made = packed(tmp_path, config)
    assert set(made.files) == {
        "job.toml", "mine.safetensors", "my_models/__init__.py", "my_models/nets.py"
    }  # fmt: skip
    assert made.entrypoint.endswith(" model.checkpoint=mine.safetensors")
    (tmp_path / "plain_folder").mkdir()
    (tmp_path / "plain_folder" / "nets.py").touch()
    namespace = packed(tmp_path, config_of(model__factory="plain_folder.nets:make"))
    assert set(namespace.files) == {"job.toml", "plain_folder/nets.py"}
    elsewhere = config_of(model__checkpoint="s3://b/mine.safetensors", model__factory="torch:nn")
    assert set(packed(tmp_path, elsewhere).files) == {"job.toml"}


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (PredictConfig, {"input__uri": "photos"}, r"input\.uri: photos is relative to a directory"),
        (PredictConfig, {"output__uri": "/data/run"}, r"output\.uri: /data/run is a path of this"),
        (PredictConfig, {"output__uri": "memory://run"}, r"output\.uri: memory://run lives in one"),
        (PredictConfig, {"input__masks": "./truth/"}, r"input\.masks: \./truth/ is relative"),
        (TrainConfig, {"data__train__masks": "truth/"}, r"data\.train\.masks: truth/ is relative"),
        (PredictConfig, {"model__checkpoint": "no.safetensors"}, r"model\.checkpoint: .* no file"),
    ],
)
def test_what_the_cluster_cannot_see_is_refused_before_anything_is_sent(
    kind, keys, message, tmp_path
):
    with pytest.raises(ConfigError, match=message):
        packed(tmp_path, config_of(kind, **keys))


def test_a_checkpoint_that_came_along_is_there_for_every_rank(monkeypatch):
    config = config_of(TrainConfig, model__checkpoint="mine.safetensors")
    monkeypatch.setattr(session, "has_working_dir", lambda: True)
    require_shared(worker_paths(config), config.storage, nodes=2)
    monkeypatch.setattr(session, "has_working_dir", lambda: False)
    with pytest.raises(ConfigError, match=r"model\.checkpoint: .* is a path of this"):
        require_shared(worker_paths(config), config.storage, nodes=2)


def test_absolute_paths_go_with_a_file_system_that_is_shared(tmp_path):
    config = config_of(input__uri="/data/in", output__uri="/data/run", storage__shared=True)
    assert set(packed(tmp_path, config).files) == {"job.toml"}


def test_an_upload_that_is_too_large_is_refused_with_its_largest_files(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "MOST_BYTES", 1000)
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes(b"0" * 2_000_000)
    with pytest.raises(ConfigError, match=rf"2\.0 MB along.*\n +2\.0 MB  {weights}\n") as error:
        packed(tmp_path, config_of(model__checkpoint=str(weights)))
    assert "object store" in str(error.value)


def test_a_run_has_one_name_wherever_it_is_submitted_from():
    name = run_name("predict", config_of())
    assert name.startswith("predict-first-")
    assert name == run_name("predict", config_of(tile__size=512, output__uri="s3://b/runs/first/"))
    assert name != run_name("predict", config_of(storage__endpoint_url="http://other"))
    assert name != run_name("predict", config_of(output__uri="s3://b/other/first"))


class Status(str):
    def is_terminal(self):
        return self in ("STOPPED", "SUCCEEDED", "FAILED")


class FakeClient:
    """A job server whose connections break after so many characters."""

    def __init__(self, jobs=None, text="", breaks=()):
        self.jobs = jobs or {}
        self.text, self.breaks = text, list(breaks)
        self.submitted = []
        self.taken = set()

    def get_job_info(self, job_id):
        if job_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        return self.jobs[job_id]

    def list_jobs(self):
        for job_id, found in self.jobs.items():
            found.submission_id = job_id
        return [SimpleNamespace(submission_id=None), *self.jobs.values()]

    def submit_job(self, submission_id, entrypoint, **_):
        if submission_id in self.taken:
            self.jobs[submission_id] = self.taken_info
            raise RuntimeError(
                f"Request failed with status code 500: Job with submission_id {submission_id} "
                "already exists."
            )
        self.submitted.append((submission_id, entrypoint))

    async def tail_job_logs(self, job_id):
        upto = self.breaks.pop(0) if self.breaks else len(self.text)
        for start in range(0, upto, 7):
            yield self.text[start : min(start + 7, upto)]
        if upto < len(self.text):
            raise aiohttp.ClientConnectionError("gone")

    def get_job_logs(self, job_id):
        return self.text


def job(status, code=None, config=None):
    metadata = {"config": config} if config else {}
    return SimpleNamespace(status=Status(status), driver_exit_code=code, metadata=metadata)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(job_server, "AGAIN_S", 0.01)

    return partial(JobServer, "http://head:8265", patience_s=5)


def test_a_run_at_work_is_attached_to_and_one_that_ended_is_continued(server, tmp_path):
    config = config_of()
    name = run_name("predict", config)
    made = packed(tmp_path, config)
    digest = made.digest(config)

    new = FakeClient()
    assert server(new).submit(name, made, config) == job_server.Submitted(name, True)
    assert new.submitted == [(name, "unet-jobs predict job.toml")]

    alive = FakeClient({name: job("RUNNING", config=digest)})
    assert server(alive).submit(name, made, config) == job_server.Submitted(name, False)
    assert not alive.submitted

    ended = FakeClient({name: job("FAILED"), f"{name}-2": job("STOPPED")})
    found = server(ended).submit(name, made, config)
    assert (found.id, found.is_new) == (f"{name}-3", True)
    assert f"{name}-2 ended as STOPPED" in found.before

    race = FakeClient()
    race.taken, race.taken_info = {name}, job("PENDING", config=digest)
    assert server(race).submit(name, made, config) == job_server.Submitted(name, False)


def test_a_run_at_work_with_another_config_is_refused_by_name(server, tmp_path):
    config = config_of()
    name = run_name("predict", config)
    client = FakeClient({name: job("RUNNING", config="of another")})
    with pytest.raises(ConfigError, match=rf"{name} is at work on s3://b/runs/first with another"):
        server(client).submit(name, packed(tmp_path, config), config)


def test_other_weights_are_another_job(tmp_path):
    weights = tmp_path / "mine.safetensors"
    digests_seen = set()
    for content in (b"first", b"second"):
        weights.write_bytes(content)
        config = config_of(model__checkpoint=str(weights))
        digests_seen.add(packed(tmp_path, config).digest(config))
    assert len(digests_seen) == 2


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["status code 503: busy", "status code 502: busy", None], "job"),
        (["status code 404: no such job"], WorkersError),
        (["status code 400: no"], WorkersError),
        (["Version check returned 404."], WorkersError),
        (["status code 500: run fix-404", None], "job"),
    ],
)
def test_what_the_server_answers_is_understood(server, answers, expected):
    def get_job_info(_):
        answer = answers.pop(0)
        if answer is not None:
            raise RuntimeError(f"Request failed with {answer}.")
        return "job"

    client = FakeClient()
    client.get_job_info = get_job_info
    if expected is WorkersError:
        with pytest.raises(WorkersError, match=r"http://head:8265(: | knows no job j)"):
            server(client).info("j")
    else:
        assert server(client).info("j") == expected


def test_a_connection_that_says_nothing_is_looked_after(server, monkeypatch):
    monkeypatch.setattr(job_server, "SILENCE_S", 0.05)
    client = FakeClient({"j": job("SUCCEEDED")}, "all of it\n")

    async def tail_job_logs(_):
        yield "all "
        await asyncio.sleep(60)

    client.tail_job_logs = tail_job_logs
    shown = []
    assert Follower(server(client), "j", shown.append).follow()[0] == 0
    assert shown == ["all of it"]


LOG = "".join(f"line {n} of a job\n" for n in range(30)) + "no newline at the end"


@pytest.mark.parametrize("breaks", [(), (0,), (5, 40, 41, 200), (15, 15, 15), (len(LOG) - 3,)])
def test_every_line_is_shown_once_however_the_connection_breaks(server, breaks):
    client = FakeClient({"j": job("SUCCEEDED")}, LOG, breaks)
    running = [job("RUNNING")] * len(breaks)
    client.get_job_info = lambda _: running.pop() if running else job("SUCCEEDED")
    shown = []
    code, how = Follower(server(client), "j", shown.append).follow()
    assert (code, how) == (0, "j ended as SUCCEEDED")
    assert shown == LOG.split("\n")


@pytest.mark.parametrize(
    ("ended", "code"),
    [(job("SUCCEEDED", 0), 0), (job("STOPPED"), 130), (job("FAILED", 3), 3), (job("FAILED"), 1),
     (job("FAILED", -9), 1)],
)  # fmt: skip
def test_the_exit_code_is_the_job_s_and_stopped_is_no_success(server, ended, code):
    follower = Follower(server(FakeClient({"j": ended})), "j", print)
    assert follower.follow()[0] == code


def test_a_cluster_that_forgot_the_job_or_is_away_says_so(server):
    with pytest.raises(WorkersError, match="knows no job j: its head was restarted; the same"):
        Follower(server(FakeClient()), "j", print).follow()
    away = FakeClient()
    away.get_job_info = lambda _: (_ for _ in ()).throw(ConnectionError("refused"))
    with pytest.raises(WorkersError, match=r"no Ray job server at http://head:8265: refused"):
        server(away, patience_s=0.05).info("j")


def test_a_server_that_is_silent_is_told_and_one_that_is_away_for_a_while_is_waited_for(
    server, monkeypatch, caplog
):
    monkeypatch.setattr(job_server, "REQUEST_S", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(WorkersError, match=f"no Ray job server at {address}: .*timed out"):
            JobServer(address)
    assert not caplog.messages
    away, refusals = FakeClient(), [ConnectionError("refused"), ConnectionError("refused")]

    def get_job_info(_):
        if refusals:
            raise refusals.pop()
        return job("RUNNING")

    away.get_job_info = get_job_info
    assert server(away).info("j").status == "RUNNING"
    (told,) = caplog.messages
    assert "no Ray job server at http://head:8265: refused" in told
    assert told.endswith("trying again for 5 s")


@pytest.mark.parametrize(("mode", "prefix"), [("token", "RAY_AUTH_MODE=token "), ("disabled", "")])
def test_the_command_that_stops_a_job_works_as_printed(mode, prefix, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    printed = job_server.stop_command("http://head:8265", "j-2")
    assert printed == f"{prefix}ray job stop --address http://head:8265 j-2"


def test_progress_lines_of_a_job_move_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    with FollowedProgress() as shown:
        for line, share in [
            ("segmenting: 25 of ~100 images, 3.0 images/s, 0 failed, 1/4 shards, 2 actors", 0.25),
            ("segmenting: 30 of ~? images, 3.0 images/s, 0 failed, 1/4 shards, 2 actors", 0.0),
            ("training: 1,500 of 3,000 steps, epoch 3/6, 20 crops/s, loss 0.1", 0.5),
        ]:
            shown.on_line(line)
            (task,) = shown.bar.tasks
            assert task.completed == share
            assert task.fields["text"] == line.partition(": ")[2]


def test_a_wrong_config_costs_no_connection(tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text("[input]\nuri = 's3://b/in'\n[output]\nuri = 's3://b/run'\nencoding = 'gif'\n")
    result = CliRunner().invoke(
        cli.cli, ["submit", "predict", str(path), "--address", "http://127.0.0.1:1"]
    )
    assert isinstance(result.exception, ConfigError)
    assert "output.encoding" in str(result.exception)
    path.write_text(path.read_text().replace("gif", "png"))
    result = CliRunner().invoke(
        cli.cli, ["submit", "predict", str(path), "--address", "http://127.0.0.1:1"]
    )
    assert result.output.startswith("job:      predict-run-")
    assert "no Ray job server at http://127.0.0.1:1" in str(result.exception)


@pytest.fixture
def server_address(ray_session):
    """The address of the suite's job server."""
    return f"http://{ray_session.webui_url}"


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_a_job_is_followed_killed_and_continued_from_another_directory(
    server_address, make_config, tmp_path, monkeypatch, capfd
):
    """Submitted, attached to by a second person, stopped, submitted again: the same bytes."""
    tars = write_many_tars(tmp_path)
    predict(make_config(input={"uri": str(tars)}, out="undisturbed"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = make_config(
        input={"uri": str(tars)}, storage={"shared": True},
        workers={"count": 1, "gpus": 1, "cpus": 1},
    )  # fmt: skip
    shutil.copy(config.model.checkpoint, "mine.safetensors")
    toml = write_toml(config, tmp_path / "elsewhere" / "job.toml")
    command = ["submit", "predict", toml, "model.checkpoint=mine.safetensors"]
    command += ["--address", server_address, "--follow"]
    codes = []

    def follow():
        codes.append(CliRunner().invoke(cli.cli, command).exit_code)

    people = [threading.Thread(target=follow) for _ in range(2)]
    for person in people:
        person.start()
    server = JobServer(server_address)
    name = run_name("predict", config)
    metrics = tmp_path / "run" / "metrics"
    while len([*metrics.glob("*.parquet")] if metrics.exists() else []) < 2:
        time.sleep(0.05)
        if not any(person.is_alive() for person in people):
            pytest.fail(f"it ended at once: {server.client.get_job_logs(name)}")
    server.stop(name)
    for person in people:
        person.join()
    assert codes == [130, 130]
    assert "stopped; the same command continues" in server.client.get_job_logs(name)
    assert not (tmp_path / "run" / "_SUCCESS").exists()
    again = CliRunner().invoke(cli.cli, command)
    assert again.exit_code == 0
    assert f"{name} ended as STOPPED; the same run goes on as {name}-2" in again.output
    assert "48 seen = 48 ok + 0 failed" in capfd.readouterr().out + again.output
    assert server.info(name).status == "STOPPED"
    with pytest.raises(WorkersError, match="knows no job"):
        server.info(f"{name}-3")
    assert digests(tmp_path / "run") == digests(tmp_path / "undisturbed")
