"""Pixels that are no pixels: through prediction, training and stores, whatever value says so."""

import io
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from jobs.predict import predict
from tests.support.data import tiff, write_tar
from tests.support.runs import config_of, table
from tests.support.scenes import config_of as training_of
from unet_core.images import large_tiff
from unet_core.runs.reader import open_run
from unet_core.runs.verify import verify
from unet_core.synthetic import nuclei, png
from unet_core.training.fit import fit

GRAY, TRUTH = nuclei(260, 240, np.random.default_rng(5))
VALUES = {
    "uint8": ["0", "255", "77"],
    "uint16": ["0", "65535", "9"],
    "int16": ["-9999", "-32768", "32767"],
    "float32": ["-9999", "nan", "-3.40282346638529e+38", "inf", "0"],
}
PATTERNS = ["border", "holes", "nothing", "everything"]


def is_outside(pattern, shape):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return {
        "border": (y < 40) | (x >= 100),
        "holes": (y // 9 + x // 7) % 5 == 0,
        "nothing": y < 0,
        "everything": y >= 0,
    }[pattern]


def stored(dtype, value, pattern, bands):
    """The scene, which has none of ``VALUES``, and a nodata value outside of it; the second band
    has that in more rows.
    """
    most = 250 if dtype == "uint8" else 30_000
    scene = (GRAY.astype(np.float64) * (1 if dtype == "uint8" else 100) + 20).clip(20, most)
    scene[scene == 77] = 78
    pixels = np.stack([scene - (n if dtype != "uint8" else 0) for n in range(bands)]).astype(dtype)
    outside = is_outside(pattern, GRAY.shape)
    number = np.array(float(value)).astype(dtype)
    pixels[:, outside] = number
    if bands == 3:
        pixels[1, :20] = number
    return pixels, outside


def encoded(dtype, value, pattern, bands, tiled):
    pixels, _ = stored(dtype, value, pattern, bands)
    options = {"tile": (32, 48), "compression": "zlib"} if tiled else {}
    return tiff(
        pixels[0] if bands == 1 else pixels.transpose(1, 2, 0),
        photometric="minisblack" if bands == 1 else "rgb",
        extratags=[(42113, "s", 0, value, True)],
        metadata=None,
        **options,
    )


def write(root, container, data):
    root.mkdir()
    if container == "webdataset":
        write_tar(root / "a.tar", {"a.tif": data})
    elif container == "parquet":
        pq.write_table(pa.table({"image": [data]}), root / "a.parquet")
    else:
        (root / "a.tif").write_bytes(data)
    return root


def rows_of(run):
    """What a run says of its images, but where they lie."""
    return [
        {k: v for k, v in row.items() if k not in ("source_uri", "image_id", "key")}
        for kind in ("masks", "metrics")
        for row in table(run, kind)
    ]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_nodata_value_changes_a_byte(data, tiny_model):
    container = data.draw(st.sampled_from(["folder", "webdataset", "parquet"]))
    dtype = data.draw(st.sampled_from(sorted(VALUES)))
    several = st.lists(st.sampled_from(VALUES[dtype]), min_size=2, max_size=2, unique=True)
    values = data.draw(several)
    pattern, bands = data.draw(st.sampled_from(PATTERNS)), data.draw(st.sampled_from([1, 3]))
    tile, is_large = data.draw(st.sampled_from([208, 512])), data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if is_large:
            patch.setattr(large_tiff, "SMALL_PIXELS", 0)
        found = []
        for number, value in enumerate(values):
            root = Path(folder) / str(number)
            image = encoded(dtype, value, pattern, bands, tiled=data.draw(st.booleans()))
            run = Path(folder) / f"run-{number}"
            options = {"tile": {"size": tile}, "output": {"probabilities": "uint8"}}
            predict(config_of(write(root, container, image), tiny_model, run, **options))
            assert verify(str(run), deep=True).problems == []
            found.append(rows_of(run))
        assert found[0] == found[1]
        outside = is_outside(pattern, GRAY.shape)
        (row,) = (row for row in found[0] if "class_pixels" in row)
        assert row["invalid_pixels"] == outside.sum()
        assert sum(row["class_pixels"]) + row["invalid_pixels"] == GRAY.size


@pytest.mark.parametrize("dtype", sorted(VALUES))
@pytest.mark.parametrize("is_large", [False, True])
def test_statistics_are_those_of_what_is_left(dtype, is_large, tiny_model, tmp_path, monkeypatch):
    if is_large:
        monkeypatch.setattr(large_tiff, "SMALL_PIXELS", 0)
    pixels, outside = stored(dtype, VALUES[dtype][0], "border", 1)
    whole = encoded(dtype, VALUES[dtype][0], "border", 1, tiled=True)
    left = tiff(pixels[0, 40:, :100], tile=(32, 48), metadata=None)
    rows = []
    for name, data in (("whole", whole), ("left", left)):
        root = write(tmp_path / name, "folder", data)
        predict(config_of(root, tiny_model, tmp_path / f"run-{name}"))
        rows += table(tmp_path / f"run-{name}", "metrics")
    assert rows[0]["normalization"] == rows[1]["normalization"]
    assert sum(rows[0]["class_pixels"]) == sum(rows[1]["class_pixels"]) == (~outside).sum()


def alpha_png(value, alpha):
    pixels = np.where(alpha > 0, GRAY, value).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.dstack([pixels, alpha]), "LA").save(buffer, "PNG")
    return buffer.getvalue()


ALPHA = np.where(is_outside("border", GRAY.shape), 0, 200).astype(np.uint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_masks_say_where_there_is_no_pixel(tiny_model, tmp_path):
    for name, data in (
        ("alpha", alpha_png(0, ALPHA)),
        ("constant", alpha_png(0, np.zeros_like(ALPHA))),
    ):
        root = write(tmp_path / name, "folder", b"")
        (root / "a.tif").unlink()
        (root / "a.png").write_bytes(data)
        options = {"encoding": "png", "probabilities": "float16"}
        predict(config_of(root, tiny_model, tmp_path / f"run-{name}", output=options))
    results = open_run(str(tmp_path / "run-alpha"))
    mask = results.mask("a.png")
    assert results.nodata == 255
    assert ((mask == 255) == (ALPHA == 0)).all()
    assert results.totals.invalid_pixels == (ALPHA == 0).sum()
    (row,) = table(tmp_path / "run-alpha", "masks")
    probabilities = np.frombuffer(row["probabilities"], np.float16).reshape(GRAY.shape)
    assert not probabilities[ALPHA == 0].any()
    assert probabilities[ALPHA > 0].all()
    assert open_run(str(tmp_path / "run-constant")).totals.invalid_pixels == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("nodata", "invalid"), [("auto", ALPHA == 0), ("none", ALPHA < 0), (0.0, GRAY == 0)]
)
def test_a_config_may_say_what_is_nodata(nodata, invalid, tiny_model, tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (root / "a.png").write_bytes(alpha_png(0, ALPHA) if nodata != 0 else png(GRAY))
    predict(config_of(root, tiny_model, tmp_path / "run", input={"nodata": nodata}))
    assert open_run(str(tmp_path / "run")).totals.invalid_pixels == invalid.sum()


def test_truth_counts_only_where_there_are_pixels(tiny_model, tmp_path):
    root = write(tmp_path / "images", "folder", encoded("uint8", "255", "border", 1, False))
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "a.png").write_bytes(png(TRUTH))
    predict(config_of(root, tiny_model, tmp_path / "run", input={"masks": f"{masks}/"}))
    (row,) = table(tmp_path / "run", "metrics")
    outside = is_outside("border", GRAY.shape)
    assert sum(row["confusion"]) == (~outside).sum()
    assert row["tp"][1] + row["fn"][1] == TRUTH[~outside].sum()
    assert row["ignored_pixels"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["border", "holes"])
@pytest.mark.parametrize("overrides", [(), ("loss.boundary=5", "loss.dice=1"), ("train.ema=0.9",)])
def test_no_nodata_value_changes_a_weight(pattern, overrides, tmp_path):
    found = []
    for value in ("255", "7"):
        root = tmp_path / value
        for kind in ("images", "masks"):
            (root / kind).mkdir(parents=True)
        for number in range(4):
            name = f"{number}"
            data = encoded("uint8", value, pattern, 1, False)
            (root / "images" / f"{name}.tif").write_bytes(data)
            truth = np.where(is_outside(pattern, GRAY.shape), number % 2, TRUTH).astype(np.uint8)
            (root / "masks" / f"{name}.png").write_bytes(png(truth))
        config = training_of(root, root / "out", "train.epochs=2", *overrides)
        list(fit(config))
        found.append(load_file(root / "out" / "best.safetensors"))
    assert all((found[0][name] == found[1][name]).all() for name in found[0])


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # clients that s3fs caches
def test_in_a_store_it_is_the_same(s3, tiny_model, tmp_path):
    root = write(tmp_path / "images", "folder", encoded("uint16", "65535", "holes", 3, True))
    uri = s3.upload(root, f"validity-{uuid.uuid4().hex[:8]}")
    storage = {"endpoint_url": s3.url}
    predict(config_of(root, tiny_model, tmp_path / "local"))
    predict(config_of(uri, tiny_model, tmp_path / "store", storage=storage))
    assert rows_of(tmp_path / "local") == rows_of(tmp_path / "store")
