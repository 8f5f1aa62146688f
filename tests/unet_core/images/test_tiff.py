import io

import numpy as np
import pytest
import tifffile

from jobs.predict import predict
from tests.support.data import reading, tiff
from tests.support.rasters import pixels_of
from tests.support.runs import masks_of
from unet_core.config.loading import build
from unet_core.config.train import TrainConfig
from unet_core.errors import ImageError
from unet_core.networks.header import read_header
from unet_core.runs.reader import open_run
from unet_core.runs.verify import verify
from unet_core.synthetic import nuclei, png
from unet_core.training.fit import fit

RANDOM = np.random.default_rng(0)
LIMIT = 10_000
FIVE_CYX = RANDOM.integers(0, 65536, (5, 24, 31), dtype=np.uint16)
PAGES_QYX = RANDOM.integers(0, 256, (3, 24, 31), dtype=np.uint8)
FIVE_YXC = np.moveaxis(FIVE_CYX, 0, -1)


@pytest.mark.parametrize(
    ("data", "rules", "expected"),
    [
        (tiff(FIVE_CYX, ome=True, metadata={"axes": "CYX"}), {}, [FIVE_YXC]),
        (tiff(FIVE_CYX, imagej=True, metadata={"axes": "CYX"}), {}, [FIVE_YXC]),
        (tiff(FIVE_CYX, photometric="minisblack"), {"axes": "CYX"}, [FIVE_YXC]),
        (tiff(FIVE_YXC, photometric="minisblack", planarconfig="contig"), {}, [FIVE_YXC]),
        (tiff(FIVE_CYX, ome=True, metadata={"axes": "CYX"}), {"channels": (0, 2)},
         [FIVE_YXC[..., [0, 2]]]),
        (tiff(FIVE_CYX.astype(">u2"), byteorder=">", photometric="minisblack"),
         {"axes": "CYX", "channels": (4,)}, [FIVE_YXC[..., [4]]]),
        (tiff(PAGES_QYX, photometric="minisblack"), {"pages": "expand"}, [*PAGES_QYX[..., None]]),
        (tiff(PAGES_QYX, ome=True, metadata={"axes": "ZYX"}), {"pages": "expand"},
         [*PAGES_QYX[..., None]]),
        (tiff(FIVE_CYX[None].repeat(2, 0), ome=True, metadata={"axes": "TCYX"}),
         {"pages": "expand", "channels": (1,)}, [FIVE_YXC[..., [1]]] * 2),
    ],
)  # fmt: skip
def test_pages_and_channels_are_what_the_axes_say(data, rules, expected):
    images = pixels_of(data, reading(LIMIT, **rules))
    assert len(images) == len(expected)
    for image, pixels in zip(images, expected, strict=True):
        np.testing.assert_array_equal(image, pixels)
        assert image.dtype.isnative


@pytest.mark.parametrize(
    ("data", "rules", "code"),
    [
        (tiff(PAGES_QYX, photometric="minisblack"), {}, "frames"),
        (tiff(PAGES_QYX, ome=True, metadata={"axes": "ZYX"}), {}, "frames"),
        (tiff(PAGES_QYX, photometric="minisblack"), {"axes": "TCYX"}, "axes"),
        (tiff(FIVE_CYX, ome=True, metadata={"axes": "CYX"}), {"channels": (5,)}, "channels"),
        (tiff(np.zeros((300, 24, 31), np.uint8), photometric="minisblack"), {"axes": "CYX"},
         "too_large"),
    ],
)  # fmt: skip
def test_what_the_rules_do_not_allow_is_refused(data, rules, code):
    with pytest.raises(ImageError) as caught:
        pixels_of(data, reading(LIMIT, **rules))
    assert caught.value.code == code


def several_series():
    """An OME-TIFF of three positions, two of one size."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, ome=True) as writer:
        for shape in ((32, 32), (40, 48), (40, 48)):
            writer.write(np.full(shape, shape[0], np.uint8), metadata={"axes": "YX"})
    return buffer.getvalue()


def truncated_stack():
    """Five planes behind a single page, as ImageJ writes large stacks."""
    return tiff(FIVE_CYX, imagej=True, metadata={"axes": "ZYX"}, truncate=True)


def test_nothing_behind_the_first_page_is_overlooked():
    for data, count in ((several_series(), 3), (truncated_stack(), 5)):
        with pytest.raises(ImageError, match=f"holds {count} pages"):
            pixels_of(data, reading(LIMIT))
        assert len(pixels_of(data, reading(LIMIT, pages="expand"))) == count


@pytest.mark.parametrize(
    "data",
    [
        tiff(PAGES_QYX, photometric="miniswhite"),
        tiff(PAGES_QYX, photometric="palette", colormap=np.zeros((3, 256), np.uint16)),
    ],
)
def test_a_stack_of_odd_colours_is_refused(data):
    with pytest.raises(ImageError, match="a stack of"):
        pixels_of(data, reading(LIMIT, axes="CYX"))


def test_a_five_channel_ome_tiff_goes_through_training_and_prediction(make_config, tmp_path):
    for number in range(6):
        image, mask = nuclei(48, 48, np.random.default_rng(number))
        stack = np.random.default_rng(number).integers(0, 60000, (5, 48, 48), dtype=np.uint16)
        stack[2] = image.astype(np.uint16) * 200
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / "images" / f"{number}.ome.tif", stack, metadata={"axes": "CYX"})
        (tmp_path / "masks" / f"{number}.ome.png").write_bytes(png(mask))
    data = {"uri": f"{tmp_path}/images", "masks": f"{tmp_path}/masks", "channels": [0, 2]}
    table = {
        "data": {"train": data, "val_fraction": 0.3},
        "model": {"width": 4, "depth": 2, "color": 2, "classes": ["background", "nucleus"]},
        "train": {"epochs": 6, "crop": 48, "batch": 2, "crops_per_image": 4,
                  "learning_rate": 1e-2},
        "output": {"uri": str(tmp_path / "model")},
    }  # fmt: skip
    list(fit(build(TrainConfig, table, [])))
    best = str(tmp_path / "model" / "best.safetensors")
    assert read_header(best).network.in_channels == 2
    totals = predict(make_config(input=data, model={"checkpoint": best})).totals
    assert (totals.ok, totals.with_truth) == (6, 6)
    assert totals.scores[1].iou > 0.6
    wrong = predict(make_config(out="wrong", input={**data, "channels": []},
                                model={"checkpoint": best})).totals  # fmt: skip
    assert wrong.errors == {"channels": 6}


def test_a_bad_page_is_lost_alone(make_config, tmp_path):
    pages = PAGES_QYX.astype(np.float32)
    pages[1, 3, 4] = np.nan
    data = tiff(pages, photometric="minisblack", compression="deflate")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        start = file.pages[2].dataoffsets[0]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "z.tif").write_bytes(data[:start] + bytes(16) + data[start + 16 :])
    masks = tiff(PAGES_QYX % 2 + np.array([0, 0, 2])[:, None, None], photometric="minisblack")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "z.tif").write_bytes(masks)
    section = {"uri": f"{tmp_path}/in", "masks": f"{tmp_path}/masks", "pages": "expand"}
    run = predict(make_config(input=section, errors={"max_failed_images": 3})).run
    rows = open_run(run.store.uri()).metrics.to_pylist()
    assert [(row["image_id"], row["error_code"]) for row in rows] == [
        ("z.tif#0", None), ("z.tif#1", "not_finite"), ("z.tif#2", "decode")
    ]  # fmt: skip
    assert rows[0]["tp"] is not None
    assert verify(run.store.uri(), deep=True).problems == []


def test_expanded_pages_are_images_of_their_own(make_config, tmp_path):
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", PAGES_QYX, photometric="minisblack")
    tifffile.imwrite(tmp_path / "in" / "b.tif", PAGES_QYX[0])
    tifffile.imwrite(tmp_path / "in" / "a.tif#1.tif", PAGES_QYX[0])
    section = {"uri": str(tmp_path / "in"), "masks": "", "pages": "expand"}
    outcome = predict(make_config(input=section))

    masks = masks_of(tmp_path / "run")
    assert list(masks) == ["a.tif#0", "a.tif#1", "a.tif#2", "a.tif#1.tif", "b.tif"]
    assert (masks["a.tif#0"] == masks["b.tif"]).all()
    assert outcome.totals.images_seen == 5
    assert verify(str(tmp_path / "run"), deep=True).problems == []
