import base64
import copy
import dataclasses
import datetime
import html
import io
import itertools
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs.predict import predict
from tests.support.runs import config_of
from unet_core import open_run
from unet_core.config.loading import build
from unet_core.config.predict import PredictConfig
from unet_core.images.decoder import DecodedImage
from unet_core.images.raster import ArrayRaster
from unet_core.images.sample import Sample
from unet_core.networks.header import palette_of
from unet_core.report import facts as facts_of
from unet_core.report.activity import Activity
from unet_core.report.charts import histogram
from unet_core.report.facts import RunFacts
from unet_core.report.page import render, toml
from unet_core.report.panels import NO_DATA, PANEL, overlay, panels
from unet_core.report.scores import LARGEST, LOWEST_CONFIDENCE, RANDOM, RunScores, pick_ids
from unet_core.runs.compact import COMPACTED
from unet_core.runs.timings import TIMINGS

HOSTILE = "<img src=x onerror=alert(1)>&\"'.png"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
COUNTER = """<script>onload = () => { document.title = [...document.images].filter(
i => i.naturalWidth > 0).length + " " + document.documentElement.scrollWidth }</script>"""


def finish(folder, model):
    """A run over the images of ``folder``, in it; none of them may fail."""
    source = {"masks": f"{folder}/masks", "shard_images": 5}
    errors = {"max_failed_images": 0}
    predict(config_of(folder / "images", model, folder / "run", input=source, errors=errors))


@pytest.fixture(scope="module")
def run(folder, tiny_model, tmp_path_factory):
    """A run of 14 images: one is no image, one has a hostile name."""
    root = tmp_path_factory.mktemp("report")
    shutil.copytree(folder, root, dirs_exist_ok=True)
    shutil.copy(folder / "images" / "cell01.png", root / "images" / HOSTILE)
    (root / "images" / "<script>.png").write_bytes(b"no image")
    finish(root, tiny_model)
    return open_run(str(root / "run"))


@pytest.fixture(scope="module")
def facts(run):
    return RunFacts(run)


class Outline(HTMLParser):
    """What a page is made of."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def of(self, *tags):
        return [attributes for tag, attributes in self.found if tag in tags]


def test_a_run_explains_itself(run, facts):
    page = render(facts).decode()
    for text in ("not finished", "13 ok + 1 failed", "mean of classes", "nucleus", "cell03.png",
                 run.record.fingerprint, "more images failed than errors.max_failed_images = 0",
                 "not a TIFF, PNG", "[input]"):  # fmt: skip
        assert text in page, text
    assert [*facts.sheets] == ["random", "worst", "largest"]
    assert re.findall("<h3 id.*?>(.*?)</h3>", page) == [
        "Random images <small>drawn by chance</small>",
        "Worst images <small>lowest IoU first</small>",
        "Largest foreground <small>by share of pixels</small>",
    ]
    assert all(len(found) >= 3 for found in facts.panels.values())
    assert not facts.reasons
    micro = run.totals.scores
    assert [row["scores"].iou for row in facts.classes] == [score.iou for score in micro]
    assert facts.confusion[1] == [micro[1].fn, micro[1].tp]


def test_a_page_is_one_file_that_everybody_can_read(facts):
    outline = Outline(render(facts))
    assert not outline.of("script", "iframe", "object")
    links = [a.get("src", a.get("href", "")) for _, a in outline.found]
    assert all(link.startswith(("data:", "#")) for link in links if link)
    assert all(image["alt"] for image in outline.of("img"))
    assert all(cell.get("scope") for cell in outline.of("th"))
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in outline.of("svg"))
    levels = [int(tag[1]) for tag, _ in outline.found if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = [a["id"] for _, a in outline.found if "id" in a]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_names_from_elsewhere_are_text(facts):
    page = render(facts)
    assert b"&lt;img src=x onerror=alert(1)&gt;" in page
    assert b"<img src=x" not in page
    assert b"<script" not in page
    alts = {image["alt"] for image in Outline(page).of("img")}
    assert f"image of {HOSTILE}" in alts


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_phone_shows_every_picture_and_never_scrolls_sideways(facts, tmp_path):
    page = render(facts).replace(b"default-src 'none'", b"script-src 'unsafe-inline'")
    (tmp_path / "page.html").write_bytes(page + COUNTER.encode())
    frame = '<iframe src="page.html" style="width: 390px; height: 900px"></iframe>'
    (tmp_path / "frame.html").write_text(
        f"{frame}<script>onload = () => setTimeout(() => document.title ="
        "frames[0].document.title, 0)</script>"
    )
    shown = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=2000", "--dump-dom",
         "--enable-logging=stderr", f"file://{tmp_path}/frame.html"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    title = re.search(r"<title>(\d+) (\d+)</title>", shown.stdout)
    assert title is not None, shown.stderr
    assert int(title[1]) == len(Outline(page).of("img")) > 60
    assert int(title[2]) <= 390
    assert "CONSOLE" not in shown.stderr


def rows(count, classes=2, seed=0):
    """Metrics of images of 100 × 100, as they are stored; the last one failed."""
    random = np.random.default_rng(seed)
    confusion = random.integers(0, 100, (count, classes, classes))
    tp = confusion.diagonal(axis1=1, axis2=2)

    def lists(values):
        return pa.FixedSizeListArray.from_arrays(
            pa.array(values.reshape(-1)), values.shape[1]
        ).cast(pa.list_(pa.int64()))

    background = random.integers(0, 10001, count)
    pixels = np.concatenate([background[:, None], np.zeros((count, classes - 1), int)], axis=1)
    columns = {
        "shard_id": pa.array(np.arange(count) // 256).cast("string"),
        "image_id": pa.array(np.arange(count)).cast("string"),
        "status": pa.array(["ok"] * (count - 1) + ["failed"]),
        "height": pa.array(np.full(count, 100, np.int32)),
        "width": pa.array(random.integers(1, 40, count).astype(np.int32)),
        "class_pixels": lists(pixels),
        "confidence_sum": pa.array(random.integers(0, 65535, count)),
        "tp": lists(tp),
        "fp": lists(confusion.sum(axis=1) - tp),
        "fn": lists(confusion.sum(axis=2) - tp),
        "confusion": lists(confusion.reshape(count, -1)),
    }
    nothing = pa.nulls(count)
    return pa.table({name: columns.get(name, nothing) for name in COMPACTED.names})


def test_one_pass_finds_what_a_loop_over_all_rows_finds():
    table = rows(50, classes=3)
    found = RunScores([table.slice(0, 17), table.slice(17)], 3, most=5)
    ious = []
    for row in table.to_pylist()[:-1]:
        of_class = [t / (t + p + n) for t, p, n in zip(row["tp"], row["fp"], row["fn"], strict=True)
                    if t + p + n][row["tp"][0] + row["fp"][0] + row["fn"][0] > 0 :]  # fmt: skip
        ious.append(sum(of_class) / len(of_class))
    assert np.allclose(found.values["iou"], ious)
    assert [pick.image_id for pick in found.worst] == [str(n) for n in np.argsort(ious)[:5]]
    assert [p.image_id for p in found.picks[LARGEST]] == [
        str(n) for n in np.argsort(-found.values["foreground"].to_numpy(), kind="stable")[:5]
    ]
    assert found.confusion_KK.sum() == sum(sum(r["confusion"]) for r in table.to_pylist()[:-1])
    assert len({pick.image_id for pick in found.picks[RANDOM]}) == 5
    assert [pick.image_id for pick in pick_ids([table], ["49", "7"])] == ["7"]
    truthless = table.drop(["tp", "fp", "fn", "confusion"])
    for name in ("tp", "fp", "fn", "confusion"):
        truthless = truthless.append_column(name, pa.nulls(50, pa.list_(pa.int64())))
    found = RunScores([truthless], 3)
    assert (found.has_truth, found.confusion_KK.size) == (False, 0)
    assert found.worst == found.picks[LOWEST_CONFIDENCE] != []


def noise(number):
    """An image that no format makes small."""
    random = np.random.default_rng(number)
    pixels_CHW = random.integers(0, 256, (3, PANEL, PANEL), np.uint8)
    ids = random.integers(0, 64, (2, 1, PANEL, PANEL), np.uint8)
    one = np.ones(3, np.float32)
    sample = Sample(str(number), "", "", bytes)
    return DecodedImage(sample, ArrayRaster(pixels_CHW), one, one, ArrayRaster(ids[0])), ids[1][0]


def other(facts, **values):
    """Facts of which some are others."""
    found = copy.copy(facts)
    vars(found).update(values)
    return found


def test_many_rows_and_classes_and_noise_make_a_page_below_5_megabytes(facts):
    palette = tuple((n, 255 - n, 7 * n % 256) for n in range(64))
    batches = [rows(8192, seed=seed) for seed in range(4)] * 15
    measured = RunScores(batches, 2)
    assert measured.values.num_rows == 60 * 8191
    drawn = [panels(*noise(n), palette, 255) for n in range(4)]
    picks = measured.picks[RANDOM]
    sizes, size_count = facts_of.sizes_of(measured)
    names = [f"a class with a long name {n}" for n in range(64)]
    page = render(
        other(
            facts,
            classes=[facts.classes[0] | {"name": name} for name in names],
            class_count=64,
            confusion=[[10**9] * 64] * 64,
            plots=list(facts_of.distributions(measured)),
            sizes=sizes,
            size_count=size_count,
            sheets={"random": picks * 3},
            panels={pick.image_id: drawn[n % 4] for n, pick in enumerate(picks)},
        )
    )
    assert len(page) < 5e6


def shown(panel):
    with Image.open(io.BytesIO(base64.b64decode(panel.uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("has_truth", [False, True])
@pytest.mark.parametrize(("classes", "nodata"), [(2, 255), (255, 255), (256, 65535)])
@pytest.mark.filterwarnings("error")
def test_pixels_that_are_no_data_have_a_color_of_their_own_in_every_panel(
    classes, nodata, has_truth
):
    gray_HW = np.full((90, 80), 9, np.uint16)
    gray_HW[:, 20:60] = np.arange(40) + 1000
    truth_HW = np.zeros((90, 80), np.uint16)
    truth_HW[40:] = classes - 1
    valid_HW = np.zeros((90, 80), bool)
    valid_HW[:, 20:60] = True
    mask_HW = np.where(valid_HW, truth_HW, nodata).astype(np.uint16)
    one, truth = np.ones(1, np.float32), ArrayRaster(truth_HW[None]) if has_truth else None
    pixels, sample = ArrayRaster(gray_HW[None], valid_HW), Sample("a", "", "", bytes)
    decoded = DecodedImage(sample, pixels, one, one, truth)
    made = panels(decoded, mask_HW, palette_of(classes), ignore_index=999)
    drawn = {panel.title: shown(panel) for panel in made}
    assert len(drawn) == 3 + has_truth
    for title, rgb_HWC in drawn.items():
        distance_HW = np.abs(rgb_HWC - NO_DATA).sum(axis=2)
        assert distance_HW[:, :12].max() < 20, title
        assert distance_HW[:, 68:].max() < 20, title
        assert np.median(distance_HW[:, 24:56]) > 60, title
    assert np.ptp(drawn["image"][45, 24:56]) > 150  # stretched by what is valid
    with Image.open(io.BytesIO(overlay(decoded, mask_HW, palette_of(classes)))) as image:
        assert (np.asarray(image)[~valid_HW] == NO_DATA).all()


def test_a_page_says_how_much_is_no_data(run, facts):
    assert "no data" not in render(facts).decode().replace("or no data", "")
    some = dataclasses.replace(facts.totals, invalid_pixels=facts.totals.pixels // 4)
    for mean in (facts.mean, {}):
        page = render(other(facts, totals=some, mean=mean)).decode()
        assert "no data</li>" in page
        assert f"{some.invalid_pixels:,} that are no data" if mean else "25.00 % of all" in page


def test_what_cannot_be_shown_says_so_in_its_place(folder, tiny_model, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for number in range(6, 12):
        (tmp_path / "images" / f"cell{number:02d}.png").unlink()
    finish(tmp_path, tiny_model)
    (tmp_path / "images" / "cell02.png").unlink()
    (tmp_path / "images" / "cell03.png").write_bytes(b"rewritten")
    found = RunFacts(open_run(str(tmp_path / "run")))
    reasons = found.reasons
    assert [len(picks) for picks in found.sheets.values()] == [6]
    assert "it was there when the run began" in reasons["cell02.png"]
    assert "cell03.png" in reasons["cell03.png"]
    assert (len(found.panels), len(reasons)) == (4, 2)


def warnings_of(facts):
    """The warnings at the head of a page, as text."""
    (found,) = re.findall(r'(?s)aria-label="Warnings">(.*?)</ul>', render(facts).decode())
    lines = re.findall(r"(?s)<li>(.*?)</li>", found)
    return [html.unescape(re.sub(r"\s+", " ", line).strip()) for line in lines]


def test_warnings_tell_what_is_wrong_and_what_to_do(facts):
    assert warnings_of(facts) == [
        f"Not finished: {facts.shards} of {facts.shards} shards are committed; more images failed "
        "than errors.max_failed_images = 0 lets pass.",
        "1 images failed (7.14%); see failures below.",
    ]
    totals = dataclasses.replace(facts.totals, failed=0, errors={"truth": 1200})
    name = "<a long name> 'b'" * 9
    committed = f"Not finished: {facts.shards} of {facts.shards} shards are committed; "
    assert warnings_of(other(facts, totals=totals, only_class=name)) == [
        f"{committed}run predict again to see what keeps it from ending.",
        "Not reconciled: 14 images were seen, but 13 + 0 have a row; run verify to see where.",
        "The truth of 1,200 images could not be used; they have no scores.",
        f"Every pixel of all 13 images is {name!r}: is this the model for these "
        "images? See model.threshold, and what the model was trained on.",
    ]
    told = warnings_of(other(facts, totals=totals, shards=1200))
    assert told[0].endswith("of 1,200 shards are committed; run predict again to continue.")
    fine = dataclasses.replace(facts.totals, failed=0, images_seen=13)
    page = render(other(facts, totals=fine, is_finished=True))
    assert b'class="warnings"' not in page


def test_a_run_without_any_result_has_a_page(folder, tiny_model, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copytree(folder / "masks", tmp_path / "masks")
    (tmp_path / "images" / "cell01.png").write_bytes(b"no image")
    finish(tmp_path, tiny_model)
    found = RunFacts(open_run(str(tmp_path / "run")))
    assert (found.sheets, found.plots, found.confusion, len(found.causes)) == ({}, [], [], 1)
    assert b"0 ok + 1 failed" in render(found)
    for folder_name in ("metrics", "masks", "timings"):
        shutil.rmtree(tmp_path / "run" / folder_name)
    found = RunFacts(open_run(str(tmp_path / "run")))
    page = render(found)
    assert b"Not finished: 0 of 1 shards" in page
    assert b"not finished" in page


def test_the_config_shown_is_a_config_again(run, facts):
    page = html.unescape(render(facts).decode())
    (shown,) = re.findall(r'aria-label="Config"><pre><code>(.*?)</code>', page, re.DOTALL)
    assert build(PredictConfig, tomllib.loads(shown), []) == run.config
    table = {"input": {"uri": 'a"b', "label_map": {"255": 1}, "masks": None, "allow": ["é"]}}
    assert tomllib.loads(toml(table)) == {
        "input": {"uri": 'a"b', "label_map": {"255": 1}, "allow": ["é"]}
    }


def test_time_in_which_nobody_worked_is_cut_out():
    began = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    table = [
        {name: 0.0 for name in TIMINGS.names if name.endswith("_s")}
        | {"shard_id": str(n), "attempt": 1, "actor": actor, "images": 100, "pixels": 10**6,
           "device_s": 8.0, "waiting_for_reading_s": 2.0, "whole_s": 10.0,
           "finished": began + datetime.timedelta(seconds=10 * (n + 1) + 7200 * (n >= 5))}
        for n in range(10) for actor in ("a", "b")
    ]  # fmt: skip
    found = Activity(pa.Table.from_pylist(table, schema=TIMINGS))
    assert found.worked_s == pytest.approx(100)
    assert (found.pauses, found.images) == (1, 2000)
    assert [plot.rules[0].at for plot in found.plots] == pytest.approx([50, 50])
    rates = [float(point.split(",")[1]) for point in found.plots[0].marks[0].d.split()]
    assert rates == pytest.approx([0] * len(rates))  # as high as it gets: always 20 images/s
    assert found.shares["busy"] == pytest.approx(0.8)
    assert [(actor["name"], actor["images"]) for actor in found.actors] == [
        ("a", 1000),
        ("b", 1000),
    ]
    assert found.began == began


def test_attempts_count_by_the_clock_however_many_overlap():
    began = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    ends_s = (10, 15, 60)  # nobody worked from 15 to 50
    table = [
        {name: 0.0 for name in TIMINGS.names if name.endswith("_s")}
        | {"shard_id": str(n), "attempt": 1, "actor": "a", "images": 100, "pixels": 10**6,
         "device_s": 19.0, "whole_s": 10.0, "finished": began + datetime.timedelta(seconds=end_s)}
        for n, end_s in enumerate(ends_s)
    ]  # fmt: skip
    found = Activity(pa.Table.from_pylist(table, schema=TIMINGS))
    assert (found.worked_s, found.images) == (pytest.approx(25), 300)
    assert (found.pauses, found.began) == (0, began)


def test_a_page_says_of_how_many_images_it_has_timings(facts):
    few = other(facts.activity, images=5)
    said = b"Timings are here of"
    assert said not in render(facts)
    assert said + b" 5 of 14 images" in render(other(facts, activity=few))


@pytest.mark.parametrize("value", [0.0, 0.5, 0.998, 1.0])
def test_a_histogram_of_one_value_shows_it_inside_its_axis(value):
    plot = histogram("all the same", np.full(7, value, np.float32))
    (bar,) = plot.marks
    assert [float(part) for part in bar.name.split(":")[0].split(" to ")] == pytest.approx(
        [value, value], abs=1e-3
    )
    assert float(plot.x[-1].text) <= 1.0
