import numpy as np
import pytest

from jobs.predict import predict
from tests.support.runs import config_of, table
from unet_core.synthetic import nuclei, png

WORLD = b"0.5\n0\n0\n-0.25\n500000.25\n4199999.875\n"
GRAY, _ = nuclei(60, 50, np.random.default_rng(0))


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for name in ("a.png", "b.PNG", "c.jpg.png", "d.png", "e.png"):
        (root / name).write_bytes(png(GRAY))
    for name in ("a.pgw", "b.PGW", "c.jpg.wld", "d.pngw"):
        (root / name).write_bytes(WORLD)
    return root


def rows(run):
    return {row["image_id"]: row for row in table(run, "metrics")}


def test_a_world_file_places_its_image(images, tiny_model, tmp_path):
    predict(config_of(images, tiny_model, tmp_path / "run"))
    found = rows(tmp_path / "run")
    for name in ("a.png", "b.PNG", "c.jpg.png", "d.png"):
        assert found[name]["transform"] == [0.5, 0, 500000, 0, -0.25, 4200000]
        assert found[name]["pixel_size"] == [0.25, 0.5]
    assert found["e.png"]["transform"] is None


def test_an_image_fails_whose_world_file_changed_or_says_nothing(images, tiny_model, tmp_path):
    (images / "d.pngw").write_bytes(b"here")
    outcome = predict(
        config_of(images, tiny_model, tmp_path / "run", errors={"max_failed_images": 1})
    )
    assert outcome.totals.errors == {"decode": 1}
    assert "world file" in rows(tmp_path / "run")["d.png"]["error_message"]


def test_another_world_file_is_another_shard(images, tiny_model, tmp_path):
    ids = set()
    for world in (WORLD, WORLD.replace(b"500000", b"600000")):
        (images / "a.pgw").write_bytes(world)
        out = tmp_path / f"run-{len(ids)}"
        predict(config_of(images, tiny_model, out))
        ids |= {path.stem for path in (out / "metrics").iterdir()}
    assert len(ids) == 2
