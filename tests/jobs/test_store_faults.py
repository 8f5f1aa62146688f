"""What an object store and the way to it can do to a run, done to it by a proxy."""

import contextlib
import re
import time
import uuid
from dataclasses import dataclass, field

import pytest
from botocore.exceptions import ClientError

from jobs.predict import predict
from tests.support.data import digests, pictures, write_tar
from tests.support.fault_proxy import FaultProxy, Rule
from tests.support.rgw import moto_only
from tests.support.runs import config_of
from tests.support.s3 import BUCKET, S3
from unet_core.config.sections import StorageConfig
from unet_core.errors import StoreError
from unet_core.inputs.folder import ListedFile
from unet_core.runs.parts import read_metrics
from unet_core.runs.run import Run
from unet_core.runs.verify import verify
from unet_core.storage import object_stores
from unet_core.storage.store import Store
from unet_core.synthetic import png

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # clients that s3fs caches

ALWAYS = float("inf")
PLACES = {
    "an input tar": ("GET", r"\.tar"),
    "a listing of the input": ("GET", r"list-type=2.*prefix=[^&]*input"),
    "a look at the run": ("HEAD", r"/run/run\.json"),
    "run.json": ("PUT", r"/run/run\.json"),
    "the probe": ("PUT", r"/run/_probe"),
    "the manifest": ("PUT", r"/run/manifest/"),
    "a masks part": ("PUT", r"/run/masks/"),
    "a metrics part": ("PUT", r"/run/metrics/"),
    "a metrics part read back": ("GET", r"/run/metrics/"),
    "_SUCCESS": ("PUT", r"/run/_SUCCESS"),
}
FAULTS = {
    "slow down": {"last": 2},
    "internal error": {},
    "reset": {"last": 2},
    "cut": {},
    "reset inside": {},
    "cut inside": {},
    "reset after": {},
    "stall": {"seconds": 0.02},
    "silence": {"seconds": 0.02},
    "lost answer": {},
    "refuse": {"seconds": 0.05},
}
LOOSE = ("GET", r"\.png")
BROKEN_BODIES = ("slow down", "internal error", "reset", "cut", "reset inside", "cut inside")


@dataclass
class World:
    """A few pictures in the store, and the proxy that leads to it."""

    s3: S3
    proxy: FaultProxy
    model: str
    files: dict[str, bytes]
    prefix: str
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    """Kind of input → digests of the parts of a run on local disk that nothing disturbed."""
    calm: dict[str, Rule] = field(default_factory=dict)
    """Place → what a run without faults asks there."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """All that it asks."""

    def upload(self, bucket=BUCKET):
        for name, data in self.files.items():
            key = f"{self.prefix}/input-{name}"
            self.s3.client().put_object(Bucket=bucket, Key=key, Body=data)

    def config(self, out="", kind="tars", bucket=BUCKET, failing=0, masks="", **storage):
        """``out`` is a local folder, or a new place in the bucket; ``failing`` images may fail."""
        inside = f"s3://{bucket}/{self.prefix}/{uuid.uuid4().hex[:8]}/run"
        uri = f"s3://{bucket}/{self.prefix}/input-{kind}"
        storage = {"endpoint_url": self.proxy.url, **storage}
        overrides = ["input.shard_images=3", f"errors.max_failed_images={failing}"]
        masks = {"masks": masks}
        return config_of(uri, self.model, out or inside, *overrides, storage=storage, input=masks)

    def parts(self, config):
        """Digests of a run in the store."""
        bucket, _, prefix = config.output.uri.removeprefix("s3://").partition("/")
        return self.s3.digests(prefix, bucket)


def rules(fault, *places, **how):
    return {place: Rule(*PLACES[place], fault, **how) for place in places or PLACES}


@pytest.fixture(scope="module")
def calm_world(s3_server, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    made = pictures()[:6]
    files = {f"loose/{name}.png": png(image) for name, image, _ in made}
    for tar, members in (("a", made[:2]), ("b", made[2:4])):
        write_tar(folder / tar, {f"{name}.png": png(image) for name, image, _ in members})
        files[f"tars/{tar}.tar"] = (folder / tar).read_bytes()
    with pytest.MonkeyPatch.context() as environment, FaultProxy(s3_server.url).running() as proxy:
        for name, value in s3_server.environment().items():
            environment.setenv(name, value)
        world = World(s3_server, proxy, tiny_model, files, f"test-{uuid.uuid4().hex[:8]}")
        world.upload()
        for kind in ("tars", "loose"):
            predict(world.config(folder / kind, kind))
            world.expected[kind] = digests(folder / kind)
        world.calm = rules("none", last=ALWAYS)
        proxy.use(*world.calm.values())
        predict(world.config())
        world.asked = list(proxy.requests)
        yield world


@pytest.fixture
def world(s3, calm_world, monkeypatch):
    """The same with nothing counted and no rules yet, and with short pauses."""
    monkeypatch.setattr(object_stores, "FIRST_PAUSE_S", 0.01)
    calm_world.proxy.use()
    return calm_world


def require_undisturbed(world, config, kind="tars"):
    world.proxy.use()
    assert world.parts(config) == world.expected[kind]
    storage = config.storage.model_copy(update={"endpoint_url": world.s3.url})
    findings = verify(config.output.uri, deep=True, storage=storage)
    assert findings.problems == findings.notes == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_place_leaves_no_trace_and_costs_no_more_than_it_must(world, fault):
    striking = rules(fault, **FAULTS[fault])
    world.proxy.use(*striking.values())
    config = world.config()
    assert predict(config).totals.failed == 0
    for place, rule in striking.items():
        undisturbed = world.calm[place].seen
        assert rule.hits in (rule.last, rule.seen), place
        looks = fault == "lost answer"  # at what is there already, to see whether it is ours
        assert undisturbed <= rule.seen <= undisturbed + rule.hits + looks, place
    require_undisturbed(world, config)


def test_loose_images_are_read_again_one_by_one(world):
    names = [name for name in world.files if name.startswith("loose")]
    striking = [Rule("GET", name, fault) for name, fault in zip(names, BROKEN_BODIES, strict=True)]
    world.proxy.use(*striking)
    config = world.config(kind="loose")
    assert predict(config).totals.failed == 0
    assert [(rule.hits, rule.seen) for rule in striking] == [(1, 2)] * len(names)
    require_undisturbed(world, config, "loose")


def test_a_request_that_nobody_answers_is_cut_off_and_asked_again(world):
    stalled = rules("stall", "an input tar", "a metrics part", seconds=20)
    stalled |= rules("silence", "a masks part", seconds=20)
    world.proxy.use(*stalled.values())
    config = world.config(deadline_s=4)
    predict(config)
    for place, rule in stalled.items():
        assert (rule.hits, rule.seen) == (1, world.calm[place].seen + 1), place
    require_undisturbed(world, config)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_credentials_that_expire_stop_the_run_with_one_message_and_good_ones_finish_it(
    world, share
):
    first = 1 + int(share * (len(world.asked) - 1))
    rule = Rule(".*", "", "expired token", first, ALWAYS)
    world.proxy.use(rule)
    config = world.config()
    with pytest.raises(StoreError, match=r"credentials.*token expired.*same comm") as seen:
        predict(config)
    assert seen.value.exit_code == 3
    assert 1 <= rule.hits <= 6  # two shards are under way, and nothing is asked again
    world.proxy.use()
    assert predict(config).totals.failed == 0
    require_undisturbed(world, config)


@pytest.mark.parametrize("fault", ["refresh", "unknown key", "wrong key", "unknown token"])
def test_credentials_that_are_refused_end_a_run_at_once(world, fault):
    rule = Rule("GET|PUT", "", fault, len(world.asked) // 2, ALWAYS)
    world.proxy.use(rule)
    config = world.config()
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"check the credentials") as seen:
        predict(config)
    assert time.monotonic() - began < 30 < config.storage.deadline_s
    assert seen.value.exit_code == 3
    assert 1 <= rule.hits <= 6
    world.proxy.use()
    assert predict(config).totals.failed == 0
    require_undisturbed(world, config)


def test_objects_that_are_denied_or_archived_fail_alone_until_they_can_be_read(world):
    names = sorted(name for name in world.files if name.startswith("loose"))
    archived = Rule("GET", rf"input-{names[1]}", "archived", last=ALWAYS)
    denied = Rule("GET", rf"input-{names[4]}", "denied", last=ALWAYS)
    world.proxy.use(archived, denied)
    config = world.config(kind="loose", failing=2)
    outcome = predict(config)
    assert (archived.hits, denied.hits) == (1, 1)
    assert outcome.totals.ok == 4
    told = {
        row["error_code"]: row["error_message"]
        for shard_id in outcome.run.committed()
        for row in read_metrics(outcome.run.store, shard_id)[0].to_pylist()
        if row["status"] == "failed"
    }
    assert set(told) == {"archived", "forbidden"}
    again = r"; then predict --retry-failed reads it again \(masks: evaluate\)$"
    restore = r"; restore it first \(S3: aws s3api restore-object, .*\)"
    assert re.search(rf"cannot read s3://.*{names[1]}: .*class{restore}{again}", told["archived"])
    assert re.search(rf"cannot read s3://.*{names[4]}: Access Denied; .*{again}", told["forbidden"])
    world.proxy.use()
    assert predict(config, retry_failed=True).totals.failed == 0
    require_undisturbed(world, config, "loose")


@moto_only("RGW has no archive")
def test_an_archived_object_is_read_once_it_is_restored(world):
    client, name = world.s3.client(), "loose/cell01.png"
    place = {"Bucket": BUCKET, "Key": f"{world.prefix}/input-{name}"}
    client.put_object(**place, Body=world.files[name], StorageClass="DEEP_ARCHIVE")
    config = world.config(kind="loose", failing=1)
    assert predict(config).totals.errors == {"archived": 1}
    client.restore_object(**place, RestoreRequest={"Days": 1})
    assert predict(config, retry_failed=True).totals.failed == 0
    require_undisturbed(world, config, "loose")
    client.put_object(**place, Body=world.files[name])


@pytest.mark.parametrize("fault", ["denied", "archived"])
def test_a_tar_that_cannot_be_read_is_set_aside_until_it_can(world, fault):
    world.proxy.use(Rule("GET", r"/a\.tar", fault, last=ALWAYS))
    config = world.config()
    outcome = predict(config)
    assert outcome.totals.ok == 2
    (reason,) = outcome.set_aside.values()
    assert re.search(r"cannot read s3://.*/a\.tar: .*; then the same command continues$", reason)
    world.proxy.use()
    assert predict(config).set_aside == {}
    require_undisturbed(world, config)


@pytest.mark.parametrize("fault", ["denied", "archived"])
def test_a_tar_that_cannot_be_read_keeps_its_commit_when_failed_shards_are_done_again(
    world, tmp_path, fault
):
    write_tar(tmp_path / "a", {"bad.png": b"no image", "good.png": world.files["loose/cell00.png"]})
    place = f"{world.prefix}/spoiled"
    world.s3.client().upload_file(str(tmp_path / "a"), BUCKET, f"{place}/a.tar")
    config = world.config(failing=1)
    config = config.model_copy(
        update={"input": config.input.model_copy(update={"uri": f"s3://{BUCKET}/{place}"})}
    )
    first = predict(config)
    world.proxy.use(
        Rule("GET|HEAD" if fault == "denied" else "GET", r"/a\.tar", fault, last=ALWAYS)
    )
    again = predict(config, retry_failed=True)
    assert (again.was_finished, again.totals) == (True, first.totals)


@pytest.mark.parametrize("fault", ["denied", "archived"])
def test_truth_that_cannot_be_read_does_not_spoil_its_image(world, fault):
    for name, data in world.files.items():
        if name.startswith("loose/"):
            key = f"{world.prefix}/masks/{name.removeprefix('loose/')}"
            world.s3.client().put_object(Bucket=BUCKET, Key=key, Body=data)
    world.proxy.use(Rule("GET", r"/masks/cell02", fault, last=ALWAYS))
    config = world.config(kind="loose", masks=f"s3://{BUCKET}/{world.prefix}/masks")
    outcome = predict(config)
    assert (outcome.totals.ok, outcome.totals.failed) == (6, 0)
    rows = {
        row["key"]: row
        for shard_id in outcome.run.committed()
        for row in read_metrics(outcome.run.store, shard_id)[0].to_pylist()
    }
    assert rows["cell02"]["error_code"] == "truth"
    assert "the mask cannot be used: cannot read s3://" in rows["cell02"]["error_message"]


def test_access_that_is_denied_to_all_stops_the_run(world):
    calm = Rule("GET", PLACES["a listing of the input"][1], "none", last=ALWAYS)
    world.proxy.use(calm)
    predict(world.config(kind="loose"))
    denied = Rule(*LOOSE, "denied", last=ALWAYS)
    unlisted = Rule("GET", calm.path, "denied", calm.seen + 1, ALWAYS)
    world.proxy.use(denied, unlisted)
    config = world.config(kind="loose", failing=6)
    with pytest.raises(StoreError, match=r"cannot list .*Access Denied; check the cred") as seen:
        predict(config)
    assert seen.value.exit_code == 3
    world.proxy.use(denied)  # a listing shows that it is not the credentials
    assert predict(world.config(kind="loose", failing=6)).totals.errors == {"forbidden": 6}
    world.proxy.use()
    assert predict(config).totals.failed == 0
    require_undisturbed(world, config, "loose")


def test_access_that_is_withdrawn_is_told_by_what_could_be_read_before(world):
    store = Store(f"s3://{BUCKET}/{world.prefix}", world.config().storage)
    first, second, *_ = (ListedFile(store, f"input-{name}") for name in world.files)
    world.proxy.use(Rule(*LOOSE, "denied", 2, ALWAYS))
    first.read()
    with pytest.raises(StoreError, match=rf"cannot read .*{first.name}: Access Denied; check"):
        second.read()


def test_a_store_that_never_recovers_ends_at_the_deadline_and_the_run_can_go_on(world):
    (rule,) = rules("slow down", "a masks part", last=ALWAYS).values()
    world.proxy.use(rule)
    config = world.config(deadline_s=0.3)
    with pytest.raises(StoreError, match=r"tried for 0\.3 s.*same command continues") as seen:
        predict(config)
    assert seen.value.exit_code == 3
    assert 4 <= rule.hits <= 24  # pauses double
    world.proxy.use()
    assert predict(config).totals.failed == 0
    require_undisturbed(world, config)


@pytest.mark.parametrize(
    ("kind", "method", "path"),
    [("tars", *PLACES["an input tar"]), ("loose", *LOOSE), ("tars", *PLACES["a masks part"])],
)
def test_a_bucket_that_is_deleted_stops_the_run_and_fails_no_image(
    world, tmp_path, kind, method, path
):
    bucket, client = f"gone-{uuid.uuid4().hex[:8]}", world.s3.client()

    def delete(_):
        while True:  # the other shard may be writing
            for item in client.list_objects_v2(Bucket=bucket).get("Contents", []):
                client.delete_object(Bucket=bucket, Key=item["Key"])
            with contextlib.suppress(ClientError):
                return client.delete_bucket(Bucket=bucket)

    client.create_bucket(Bucket=bucket)
    world.upload(bucket)
    predict(world.config(tmp_path / "undisturbed", kind, bucket))
    out = tmp_path / "run" if method == "GET" else ""  # else the bucket takes it along
    config = world.config(out, kind, bucket)
    world.proxy.use(Rule(method, path, "none", before=delete))
    with pytest.raises(StoreError, match=f"s3://{bucket}/.* (is gone|no such .*bucket)") as seen:
        predict(config)
    assert seen.value.exit_code == 3
    client.create_bucket(Bucket=bucket)
    world.upload(bucket)
    assert predict(config).totals.failed == 0
    assert (digests(out) if out else world.parts(config)) == digests(tmp_path / "undisturbed")


def test_a_bucket_that_cannot_be_asked_about_is_not_called_missing(world):
    rule = Rule("HEAD", f"/{BUCKET}$", "slow down", last=3)
    world.proxy.use(rule)
    assert Run(f"s3://{BUCKET}", StorageConfig(endpoint_url=world.proxy.url)).store.exists()
    assert rule.hits == 3


def test_a_store_that_overwrites_what_is_to_be_created_once_is_told_at_the_start_of_a_run(
    world, caplog
):
    def make_way(path):
        key = re.match(rf"/{BUCKET}/([^?]*)", path).group(1)
        world.s3.client().delete_object(Bucket=BUCKET, Key=key)

    def warnings(rule):
        caplog.clear()
        world.proxy.use(rule)
        predict(config)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    config = world.config()
    assert warnings(Rule("PUT", "/_probe", "none", last=ALWAYS)) == []
    config = world.config()
    careless = Rule("PUT", "/run/", "none", last=ALWAYS, before=make_way)
    (warning,) = warnings(careless)
    assert "start only one at a time" in warning
    key = config.output.uri.removeprefix(f"s3://{BUCKET}/")
    assert [name for name in world.s3.objects(key) if "_probe" in name] == []
    world.s3.client().delete_object(Bucket=BUCKET, Key=f"{key}/_SUCCESS")
    assert warnings(resumed := Rule("PUT", "/_probe", "none", last=ALWAYS)) == []
    assert resumed.seen == 0
