import shutil

import numpy as np
import pytest

from tests.support.data import write_tar
from tests.support.scenes import config_of, opened
from unet_core.errors import ConfigError
from unet_core.synthetic import nuclei, png


@pytest.fixture
def images(folder, tmp_path):
    """A copy of the images that tests may damage."""
    for kind in ("images", "masks"):
        shutil.copytree(folder / kind, tmp_path / kind)
    return tmp_path


def refusal(root, *overrides):
    with pytest.raises(ConfigError) as caught:
        opened(config_of(root, root / "out", *overrides))
    return str(caught.value)


@pytest.mark.parametrize("pages", ["refuse", "expand"])
def test_everything_that_is_wrong_is_told_at_once_by_name(images, pages):
    (images / "images" / "cell03.png").write_bytes(b"no image")
    (images / "masks" / "cell05.png").write_bytes(png(np.full((40, 40), 9, np.uint8)))
    (images / "masks" / "cell07.png").unlink()
    text = refusal(images, f"data.train.pages={pages}")
    assert "data.train: cell03.png" in text
    assert "data.train: cell05.png: the mask cannot be used: the mask holds 9" in text
    assert "1 images have no mask: data.train: cell07.png" in text
    assert 'on_missing_mask = "skip" or "background"' in text


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_without_a_mask_are_left_out_or_background(images, kind):
    (images / "masks" / "cell07.png").unlink()
    overrides = ["data.val_fraction=0.3"]
    if kind == "tar":
        members = {}
        for path in sorted((images / "images").iterdir()):
            mask = images / "masks" / path.name
            members[path.name] = path.read_bytes()
            if mask.exists():
                members[f"{path.stem}.mask.png"] = mask.read_bytes()
        write_tar(images / "all.tar", members)
        overrides += [f"data.train.uri={images}/all.tar", "data.train.masks=mask.png"]
    config = config_of(images, images / "out", *overrides, "data.train.on_missing_mask=skip")
    (train, val), _ = opened(config)
    assert train.images + val.images == 11
    config = config_of(images, images / "out", *overrides, "data.train.on_missing_mask=background")
    (train, val), _ = opened(config)
    assert train.images + val.images == 12


def test_each_input_says_itself_what_happens_without_a_mask(images):
    (images / "masks" / "cell07.png").unlink()
    both = tuple(f"data.val.{k}={images}/{v}" for k, v in (("uri", "images"), ("masks", "masks")))
    text = refusal(images, *both, "data.train.on_missing_mask=skip")
    assert "1 images have no mask: data.val: cell07.png" in text
    skip = ("data.train.on_missing_mask=skip", "data.val.on_missing_mask=background")
    (train, val), _ = opened(config_of(images, images / "out", *both, *skip))
    assert (train.images, val.images) == (11, 12)


def test_masks_whose_objects_would_all_be_ignored_are_refused(images):
    for number, path in enumerate(sorted((images / "masks").iterdir())):
        _, mask = nuclei(48, 48, np.random.default_rng(number))
        path.write_bytes(png(mask * 255))
        (images / "images" / path.name).write_bytes(png(mask))
    text = refusal(images)
    assert "every pixel that counts is of class 0" in text
    assert "have the value 255, which is ignored" in text
    assert "data.train.label_map = {255 = 1}" in text
    opened(config_of(images, images / "out", "data.train.label_map={255=1}"))


def test_a_class_that_would_be_ignored_by_default_is_refused(images):
    names = f"model.classes={[str(number) for number in range(256)]}"
    assert refusal(images, names).startswith("data.train.ignore_index is 255 by default, which is")


def test_few_images_leave_one_to_validate_with(images):
    (train, val), _ = opened(config_of(images, images / "out", "data.val_fraction=0.0001"))
    assert (train.images, val.images) == (11, 1)
    assert len(train.cache.images) == 12


def test_a_split_without_images_is_refused(images):
    assert "12 images for training and 0 for validation" in refusal(images, "data.val_fraction=0.0")


def test_object_ids_become_one_class_with_borders_between_them(images):
    ids = np.zeros((48, 48), np.uint8)
    ids[4:40, 4:22], ids[4:40, 22:40] = 255, 7
    for path in (images / "masks").iterdir():
        path.write_bytes(png(ids))
        (images / "images" / path.name).write_bytes(png(ids))
    config = config_of(images, images / "out", "data.train.instances=true", "loss.boundary=10")
    (train, _), found = opened(config)
    shard = next(shard for shard, count in enumerate(train.counts) if count)
    image = train.load(next(iter(train.items(shard, [0]))))
    assert set(np.unique(image.labels_HW)) == {0, 1}
    assert set(found.label_pixels) == {0, 1}
    assert image.boundary_HW[20, 21] > 0.9  # where the two touch
    assert image.boundary_HW[20, 5] < 1e-2


def test_decoded_images_stay_in_memory_while_there_is_room(folder, tmp_path):
    config = config_of(folder, tmp_path / "out")
    (train, val), _ = opened(config)
    kept = train.cache.images
    assert len(kept) == train.images + val.images
    room = sum(image.nbytes for image in kept.values()) // 2
    (train, _), _ = opened(config, memory=room)
    assert 0 < len(train.cache.images) < 12
    assert sum(image.nbytes for image in train.cache.images.values()) <= room
