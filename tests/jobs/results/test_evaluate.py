import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from jobs.commands.arguments import run_config
from jobs.predict import predict
from jobs.results.evaluate import compare, evaluate
from jobs.tools.pack import pack
from tests.support.data import write_tar
from unet_core import open_run
from unet_core.errors import ConfigError, RunMismatchError, StoreError
from unet_core.evaluation.truth import truth_of
from unet_core.images import decoder
from unet_core.report.facts import RunFacts, evaluations
from unet_core.report.page import render
from unet_core.runs.parts import read_metrics
from unet_core.runs.reader import open_masks
from unet_core.runs.verify import verify
from unet_core.synthetic import nuclei, png

ALLOWED = ("workers.", "input.masks", "input.label_map", "input.ignore_index")
TRUTH = ("tp", "fp", "fn", "confusion", "ignored_pixels")


def evaluated(run, masks, *overrides, name="", **more):
    results = open_run(run)
    config = run_config(results, (*overrides, f"input.masks={json.dumps(masks)}"), ALLOWED)
    return evaluate(results, config, name, **more).document


def compared(run, other):
    results = open_run(run)
    return compare(results, open_run(other), run_config(results, (), ALLOWED)).document


def rows_of(folder):
    table = pq.read_table(Path(folder) / "metrics")
    return {row["key"]: row for row in table.to_pylist()}


def truths_of(folder):
    """What the rows say of their truth, by bare name."""
    return {key: [row[name] for name in TRUTH] for key, row in rows_of(folder).items()}


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """The images of ``folder`` as every other format, with their masks."""
    root = tmp_path_factory.mktemp("packed")
    (root / "beside").mkdir()
    lines = ["uri,id,truth"]
    for path in sorted((folder / "images").iterdir()):
        shutil.copy(path, root / "beside" / path.name)
        shutil.copy(folder / "masks" / path.name, root / "beside" / f"{path.stem}_mask.png")
        lines.append(f"beside/{path.name},{path.name},beside/{path.stem}_mask.png")
    (root / "list.csv").write_text("\n".join(lines))
    return root


@pytest.fixture
def input_of(folder, tars, packed, make_config):
    def find(kind):
        if kind == "parquet" and not (packed / kind).exists():
            loose = {"uri": str(folder / "images"), "masks": f"{folder}/masks"}
            pack(make_config(input=loose, output={"uri": f"{packed}/{kind}"}), kind, 50_000)
        return {
            "folder": {"uri": f"{folder}/images"},
            "tars": {"uri": str(tars)},
            "beside": {"uri": f"{packed}/beside"},
            "list": {"uri": f"{packed}/list.csv", "format": "list"},
            "parquet": {"uri": f"{packed}/parquet", "id_column": "id"},
        }[kind]

    return find


@pytest.mark.parametrize(
    ("kind", "masks"),
    [
        ("folder", ["masks/"]),
        ("tars", ["masks/", "mask.png"]),
        ("parquet", ["masks/", "mask"]),
        ("beside", ["masks/", "_mask"]),
        ("list", ["masks/", "truth"]),
    ],
)
def test_truth_that_comes_later_gives_the_rows_of_truth_that_was_there(
    make_config, input_of, folder, packed, tmp_path, kind, masks
):
    loose = {"uri": f"{folder}/images", "masks": f"{folder}/masks"}
    predict(make_config(input=loose, output={"uri": f"{packed}/with"}))  # once for all of these
    wanted = truths_of(packed / "with")
    predict(make_config(input={**input_of(kind), "masks": ""}))
    run = str(tmp_path / "run")
    for where in masks:
        document = evaluated(run, f"{folder}/{where}" if "/" in where else where)
        rows = truths_of(document["evaluation"])
        assert {key: rows[key] for key in wanted} == wanted
        assert document["images"]["compared"] == 12
        assert document["images"]["without_truth"] == len(rows) - 12
    assert verify(run, deep=True).problems == []
    assert predict(make_config(input={**input_of(kind), "masks": ""})).was_finished


def test_what_is_wrong_with_label_images_is_told(make_run, folder, tmp_path):
    shutil.copytree(folder / "masks", tmp_path / "truth")
    (tmp_path / "truth" / "cell00.png").write_bytes(b"no image")
    (tmp_path / "truth" / "cell01.png").unlink()
    (tmp_path / "truth" / "cell02.png").write_bytes(png(np.zeros((9, 9), np.uint8)))
    (tmp_path / "truth" / "cell03.png").write_bytes(png(np.full((33, 40), 7, np.uint8)))
    document = evaluated(make_run(), f"{tmp_path}/truth/", name="some")
    images = document["images"]
    assert (images["compared"], images["without_truth"], images["unusable_truth"]) == (8, 1, 3)
    assert document["without_truth"] == ["cell01.png"]
    rows = rows_of(document["evaluation"])
    told = [rows[f"cell{number:02d}"]["error_message"] for number in range(4)]
    assert told[1] is None
    for message, reason in zip(
        (told[0], told[2], told[3]), ("not a TIFF", "shape (9, 9)", "holds 7"), strict=True
    ):
        assert message.startswith("the mask cannot be used: ")
        assert reason in message
    with pytest.raises(RunMismatchError, match=r"another evaluation:(.|\n)*input.ignore_index"):
        evaluated(make_run(), f"{tmp_path}/truth/", "input.ignore_index=7", name="some")


@pytest.mark.parametrize(
    ("names", "error", "reason"),
    [
        ([], StoreError, "there are no label images in"),
        (
            ["other.png"],
            ConfigError,
            r"none of 12 images.*: cell\d\d\.png, .*label images: other\.png",
        ),
        (["cell00.png", "cell00.tif"], ConfigError, r"cell00\.png, .*cell00\.tif"),
        (["cell00.png"], ConfigError, r"none of 12 .*: cell00\.png: .*or the images themselves\?"),
    ],
)
def test_truth_of_nothing_of_images_or_of_two_names_is_refused_and_gives_no_scores(
    make_run, tmp_path, names, error, reason
):
    (tmp_path / "truth").mkdir()
    for name in names:
        (tmp_path / "truth" / name).write_bytes(png(np.full((64, 64), 7, np.uint8)))
    run = make_run()
    for _ in range(2):
        with pytest.raises(error, match=reason):
            evaluated(run, f"{tmp_path}/truth/", name="some")
    assert not [*Path(run).rglob("evaluation.json")]
    if "other.png" in names:  # the record stays: another process may be at work under it
        with pytest.raises(RunMismatchError, match=r"another evaluation:(.|\n)*ignore_index"):
            evaluated(run, f"{Path(run).parent}/truth/", "input.ignore_index=7", name="some")


def test_label_images_are_matched_by_path_and_never_by_their_bare_names(make_config, tmp_path):
    for name in ("in/a/x", "in/b/y", "truth/x", "truth/c/y"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(png(np.zeros((32, 32), np.uint8)))
    predict(make_config(input={"uri": f"{tmp_path}/in", "masks": ""}))
    reason = (
        r"none of 2 .*: a/x\.png, b/y\.png; label images: c/y\.png, x\.png; they need the paths"
    )
    with pytest.raises(ConfigError, match=reason):
        evaluated(str(tmp_path / "run"), f"{tmp_path}/truth/")
    (tmp_path / "truth" / "a").mkdir()
    (tmp_path / "truth" / "x.png").rename(tmp_path / "truth" / "a" / "x.png")
    document = evaluated(str(tmp_path / "run"), f"{tmp_path}/truth/")
    assert document["images"]["compared"] == 1
    assert document["without_truth"] == ["b/y.png"]


def test_a_label_image_of_images_in_two_tars_is_refused_by_name(make_config, tmp_path):
    image = png(np.zeros((32, 32), np.uint8))
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        write_tar(tmp_path / "in" / f"{name}.tar", {"x.png": image})
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "x.png").write_bytes(image)
    predict(make_config(input={"uri": f"{tmp_path}/in", "masks": ""}))
    reason = r"x\.png could be the truth of a\.tar/x and of b\.tar/x"
    with pytest.raises(ConfigError, match=reason):
        evaluated(str(tmp_path / "run"), f"{tmp_path}/truth/")
    for name in ("a", "b"):
        (tmp_path / "truth" / f"{name}.tar").mkdir()
        (tmp_path / "truth" / f"{name}.tar" / "x.png").write_bytes(image)
    assert evaluated(str(tmp_path / "run"), f"{tmp_path}/truth/")["images"]["compared"] == 2


def test_a_label_image_is_that_of_the_image_at_its_path_alone(make_config, tmp_path):
    image, mask = nuclei(32, 32, np.random.default_rng(1))
    for name, pixels in (("in/x", image), ("in/sub/x", image), ("truth/x", mask)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(png(pixels))
    source = {"uri": f"{tmp_path}/in", "masks": "", "shard_images": 1}
    predict(make_config(input=source))
    for masks in (f"{tmp_path}/truth/", f"{tmp_path}/truth/"):
        document = evaluated(str(tmp_path / "run"), masks)
        assert document["images"]["compared"] == 1
        assert document["without_truth"] == ["sub/x.png"]
    rows = pq.read_table(Path(document["evaluation"]) / "metrics").to_pylist()
    assert {row["image_id"]: row["truth"] for row in rows} == {"x.png": "x.png", "sub/x.png": None}
    (tmp_path / "in/x_t.png").write_bytes(png(mask))
    (tmp_path / "list.csv").write_text("uri,id,truth\nin/x.png,x,in/x_t.png\nin/x.png,b/x,\n")
    listed = {"uri": f"{tmp_path}/list.csv", "format": "list", "masks": ""}
    predict(make_config(input=listed, out="listed"))
    assert evaluated(str(tmp_path / "listed"), "truth")["without_truth"] == ["b/x"]


def test_parts_that_are_missing_or_stale_are_made_again_and_no_others(make_run, folder):
    run = make_run()
    document = evaluated(run, f"{folder}/masks/")
    parts = sorted((Path(document["evaluation"]) / "metrics").iterdir())
    before = [path.read_bytes() for path in parts]
    table = pq.read_table(parts[0])
    footer = {**table.schema.metadata, b"masks_sha256": b"of an earlier attempt"}
    pq.write_table(table.slice(1).replace_schema_metadata(footer), parts[0])
    parts[1].unlink()
    kept = parts[2].stat().st_mtime_ns
    assert evaluated(run, f"{folder}/masks/") == document
    assert [path.read_bytes() for path in parts] == before
    assert parts[2].stat().st_mtime_ns == kept


def test_label_images_of_a_list_are_held_to_what_they_were(make_config, packed, tmp_path):
    shutil.copytree(packed / "beside", tmp_path / "beside")
    shutil.copy(packed / "list.csv", tmp_path)
    predict(make_config(input={"uri": f"{tmp_path}/list.csv", "format": "list", "masks": ""}))
    run = str(tmp_path / "run")
    before = evaluated(run, "truth")
    results = open_run(run)
    wanted = results.config.input.model_copy(update={"masks": "truth"})
    source = replace(results.source, config=wanted)
    truth = truth_of(source, 2)
    mask = tmp_path / "beside" / "cell00_mask.png"
    mask.write_bytes(png(np.zeros((64, 64), np.uint8)))
    (shard,) = open_run(run).shards()
    rows = read_metrics(open_run(run).run.store, shard.shard_id)[0].to_pylist()
    first = next(truth.of(shard, rows))
    assert (first.name, first.labels.code) == (str(mask), "truth")
    after = evaluated(run, "truth")
    assert after["evaluation"] != before["evaluation"]
    assert after["classes"] != before["classes"]


@pytest.mark.parametrize("kind", ["masks", "metrics"])
def test_a_damaged_part_is_set_aside_and_named(make_run, folder, kind):
    run = make_run()
    damaged = sorted((Path(run) / kind).iterdir())[1]
    damaged.write_bytes(b"no Parquet")
    results = open_run(run)
    outcome = evaluate(results, run_config(results, (f"input.masks={folder}/masks/",), ALLOWED))
    assert list(outcome.set_aside) == [damaged.stem]
    assert "unet-jobs verify" in outcome.set_aside[damaged.stem]


def test_a_report_tells_what_is_wrong_with_an_evaluation(make_run, folder, tmp_path):
    shutil.copytree(folder / "masks", tmp_path / "truth")
    for path in (tmp_path / "truth").iterdir():
        path.write_bytes(png((np.array(Image.open(path)) > 0).astype(np.uint8) * 255))
    results = open_run(make_run())
    evaluated(results.run.uri, f"{tmp_path}/truth/", name="a")
    evaluated(results.run.uri, f"{tmp_path}/truth/", "input.label_map={255=1}", name="b")
    found = dict(evaluations(results.run.store, results.totals))
    assert "input.label_map={255=1}" in found["a"]["warning"]
    assert "warning" not in found["b"]
    assert found["b"]["of"]["input.label_map"] == {"255": 1}
    facts = RunFacts(results)
    page = render(facts)
    assert page.count(b"No pixel of truth is") == page.count(b'class="warnings"') == 1
    assert b"Evaluate again" not in page
    facts.evaluations = dict(evaluations(results.run.store, replace(results.totals, ok=1)))
    assert render(facts).count(b"Evaluate again") == 2


def test_large_images_are_compared_by_window(make_config, tmp_path, monkeypatch, small_is_large):
    image, mask = nuclei(330, 310, np.random.default_rng(1))
    for kind, pixels in (("images", image), ("masks", mask)):
        (tmp_path / kind).mkdir()
        tifffile.imwrite(tmp_path / kind / "slide.tif", pixels, tile=(64, 48))
    monkeypatch.setattr("unet_core.runs.parts.ROW_GROUP_BYTES", 40_000)
    predict(make_config(input={"uri": f"{tmp_path}/images", "masks": f"{tmp_path}/masks"}))
    monkeypatch.setattr("unet_core.images.decoder.decode_labels", None)  # would read the whole
    run = str(tmp_path / "run")
    document = evaluated(run, f"{tmp_path}/masks/")
    assert truths_of(document["evaluation"]) == truths_of(run)
    assert compared(run, run)["images"]["compared"] == 1
    (shard,) = open_run(run).shards()
    with open_masks(open_run(run).run.store, shard.shard_id) as masks:
        mask = masks.mask("slide.tif")
        assert len(mask.windows) == 9
        assert (mask.whole() == open_run(run).mask("slide.tif")).all()


def test_two_runs_are_compared_image_by_image(make_config, make_run, folder, tmp_path):
    run = make_run()
    here = tmp_path / "here"
    shutil.copytree(folder / "images", here)
    (here / "cell00.png").rename(here / "new.png")
    (here / "cell01.png").write_bytes(b"no image")
    errors = {"max_failed_images": 5}
    source = {"uri": str(here), "masks": "", "shard_images": 5}
    output = {"uri": f"{tmp_path}/later", "encoding": "png"}
    predict(make_config(input=source, model={"threshold": 0.4}, errors=errors, output=output))
    document = compared(str(tmp_path / "later"), run)
    assert document["images"] == {
        "compared": 10, "only_here": 1, "only_there": 1, "failed_there": 0, "failed_here": 1,
        "unusable_there": 0,
    }  # fmt: skip
    assert (document["only_here"], document["only_there"]) == (["new.png"], ["cell00.png"])
    flips, pixels = {}, 0
    for number in range(2, 12):
        name = f"cell{number:02d}.png"
        before, after = (open_run(r).mask(name) for r in (run, f"{tmp_path}/later"))
        flips[name] = float((before != after).mean())
        pixels += int((before != after).sum())
    assert document["changed"] == pixels / document["pixels"] > 0
    assert {i["image_id"]: i["changed"] for i in document["flipped"]} == pytest.approx(flips)
    back = compared(run, str(tmp_path / "later"))
    assert back["images"]["failed_there"] == back["images"]["only_there"] == 1
    assert np.array_equal(back["confusion"], np.transpose(document["confusion"]))
    assert compared(run, run)["changed"] == 0


def test_a_masks_part_of_the_other_run_that_lacks_a_mask_is_told(make_run):
    run, other = make_run(), make_run("other")
    part = sorted((Path(other) / "masks").iterdir())[0]
    pq.write_table(pq.read_table(part).slice(1), part)
    outcome = compare(open_run(run), open_run(other), open_run(run).config)
    assert "other lacks the mask of cell" in outcome.set_aside[part.stem]


def test_other_classes_are_not_compared(make_run):
    mine, other = open_run(make_run()), open_run(make_run())
    mine.class_names, other.class_names = ("a",), ("b",)
    with pytest.raises(
        ConfigError, match=r"are a, those of .* b; only equal ones.*model\.classes=\[\"b\"\]"
    ):
        compare(mine, other, mine.config)


def test_the_verb_prints_a_table_or_one_document(run_cli, make_run, folder, tmp_path):
    run = make_run()
    code, out, _ = run_cli("evaluate", run, "--truth", f"{folder}/masks/", "workers.count=inline")
    assert (code, "12 of 12 compared" in out, "precision" in out) == (0, True, True)
    assert f"unet-jobs report {run}" in out
    assert len([line for line in out.splitlines() if line.split()[0] in ("nucleus", "mean")]) == 2
    code, out, err = run_cli("evaluate", run, "--against", run, "--json")
    assert (code, err, json.loads(out)["changed"]) == (0, "", 0)
    for arguments, reason in (
        (["tile.size=512", "--truth", "x/"], "tile.size is as the run was made"),
        (["--truth", "x/", "--against", run], "one of --truth WHERE and --against RUN2"),
        (["truth/"], "write --truth truth/"),
        (["--truth", "x/", "label_map={255=1}"], "did you mean input.label_map"),
        (["--truth", f"{folder}/masks/", "--name", "../up"], "--name ../up"),
    ):
        code, out, err = run_cli("evaluate", run, *arguments)
        assert (code, out) == (2, "")
        assert reason in err


def test_a_damaged_tar_and_a_tar_written_again_are_told(make_config, tmp_path):
    (tmp_path / "in").mkdir()
    image = png(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32))
    for name in ("a", "b"):
        members = {f"{name}.png": image, f"{name}.mask.png": png(np.zeros((32, 32), np.uint8))}
        write_tar(tmp_path / "in" / f"{name}.tar", members)
    predict(make_config(input={"uri": f"{tmp_path}/in", "masks": ""}))
    write_tar(tmp_path / "in" / "b.tar", {"b.png": image})
    results = open_run(str(tmp_path / "run"))
    config = run_config(results, ("input.masks=mask.png",), ALLOWED)
    outcome = evaluate(results, config)
    assert list(outcome.set_aside) == ["b.tar"]
    assert outcome.document["images"]["compared"] == 1
    assert not (Path(outcome.document["evaluation"]) / "evaluation.json").exists()


def test_an_id_that_comes_twice_leaves_the_truth_of_the_others_alone(make_config, tmp_path):
    image, mask = nuclei(32, 32, np.random.default_rng(1))
    columns = {"image": [png(image)] * 5, "mask": [png(mask)] * 5, "id": [*"abcad"]}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    source = {"uri": f"{tmp_path}/in.parquet", "id_column": "id", "masks": ""}
    predict(make_config(input=source, errors={"max_failed_images": 1}))
    assert evaluated(str(tmp_path / "run"), "mask")["images"]["compared"] == 4


def test_expanded_pages_have_their_own_truth(make_config, tmp_path, monkeypatch):
    for kind, top in (("images", 255), ("masks", 2)):
        (tmp_path / kind).mkdir()
        pages = np.random.default_rng(1).integers(0, top, (3, 40, 48)).astype(np.uint8)
        tifffile.imwrite(tmp_path / kind / "z.tif", pages, photometric="minisblack")
    source = {"uri": f"{tmp_path}/images", "pages": "expand"}
    decoded, real = [], decoder.decode_labels
    monkeypatch.setattr(decoder, "decode_labels", lambda *args: decoded.append(1) or real(*args))
    predict(make_config(input=source | {"masks": f"{tmp_path}/masks"}, out="with"))
    predict(make_config(input=source | {"masks": ""}))
    document = evaluated(str(tmp_path / "run"), f"{tmp_path}/masks/")
    assert len(decoded) == 2  # each time one file for three images
    assert truths_of(document["evaluation"]) == truths_of(tmp_path / "with")
