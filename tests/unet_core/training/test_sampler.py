from collections import Counter

import numpy as np
import pytest
import tifffile

from tests.support.data import IMAGES, write_tar
from tests.support.scenes import config_of, opened
from unet_core.config.train import FitConfig
from unet_core.training.sampler import EpochSampler, slots_of


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """One TIFF of 9 pages, and one of as many masks."""
    root = tmp_path_factory.mktemp("stack")
    random = np.random.default_rng(0)
    for kind, top in (("images", 255), ("masks", 1)):
        (root / kind).mkdir()
        pages = random.integers(0, top + 1, (9, 40, 50)).astype(np.uint8)
        tifffile.imwrite(root / kind / "volume.tif", pages, photometric="minisblack")
    return root


@pytest.fixture(params=["folder", "tars", "one tar", "pages", "no room"])
def split(request, folder, tars, stack, tmp_path):
    """The training images of every kind of input; ``no room``: none stays in memory."""
    paths = sorted((folder / "images").iterdir())
    members = {f"{p.stem}{kind}.png": (folder / at / p.name).read_bytes()
               for p in paths for kind, at in (("", "images"), (".mask", "masks"))}  # fmt: skip
    write_tar(tmp_path / "one.tar", members)
    overrides = {
        "folder": (),
        "no room": (),
        "tars": (f"data.train.uri={tars}", "data.train.masks=mask.png"),
        "one tar": (f"data.train.uri={tmp_path}/one.tar", "data.train.masks=mask.png"),
        "pages": (f"data.train.uri={stack}/images", f"data.train.masks={stack}/masks",
                  "data.train.pages=expand"),
    }[request.param]  # fmt: skip
    config = config_of(folder, tmp_path / "out", *overrides)
    (train, _), _ = opened(config, memory=0 if request.param == "no room" else 2**30)
    return train


def steps_of(split, slots, ranks, epoch=0, repeats=1, skip=0):
    """Image ids of each step in the order of the slots, drawn by this number of ranks together."""
    sampler = EpochSampler(FitConfig(seed=7, batch=slots, crops_per_image=repeats), split, epoch)
    drawn = [list(sampler.batches(slots_of(rank, ranks, slots), skip)) for rank in range(ranks)]
    return [
        [entry and (entry[0], entry[1].image.image_id) for part in parts for entry in part]
        for parts in zip(*drawn, strict=True)
    ]


@pytest.mark.parametrize("slots", [1, 3, 8, 20])
def test_an_epoch_has_every_image_once(split, slots):
    steps = steps_of(split, slots, 1)
    drawn = Counter(entry[1] for step in steps for entry in step if entry)
    assert len(drawn) == split.images
    assert set(drawn.values()) == {1}
    assert all(None not in step for step in steps[:-1])  # only the last step has gaps


def test_repeats_take_every_image_so_many_times(split):
    drawn = Counter(entry for step in steps_of(split, 4, 1, repeats=3) for entry in step if entry)
    assert set(drawn.values()) == {1}
    assert Counter(image_id for _, image_id in drawn).most_common()[-1][1] == 3


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_sees_the_same_images_in_the_same_steps(split, ranks):
    assert steps_of(split, 5, ranks) == steps_of(split, 5, 1)


def test_a_resume_goes_on_in_the_middle(split):
    assert steps_of(split, 2, 2, skip=2) == steps_of(split, 2, 1)[2:]


def test_epochs_differ_and_repeat(split):
    if split.images > 2:
        assert steps_of(split, 2, 1, epoch=1) != steps_of(split, 2, 1)
    assert steps_of(split, 2, 1, epoch=1) == steps_of(split, 2, 1, epoch=1)


def test_shards_are_added_up_once_an_epoch(split):
    sums = []

    class Counts(list):
        def __iter__(self):
            sums.append(self)
            return super().__iter__()

    split.counts = Counts(split.counts)
    sampler = EpochSampler(FitConfig(batch=2), split, 0)
    assert sum(sampler.batch_size(range(2), step) for step in range(sampler.steps)) == split.images
    assert len(sums) == 2  # the second is that of this test


def test_splits_share_no_image_and_lose_none(folder, tmp_path):
    (train, val), _ = opened(config_of(folder, tmp_path / "out"))
    ids = [{entry[1] for step in steps_of(split, 1, 1) for entry in step} for split in (train, val)]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == IMAGES
    assert min(map(len, ids)) > 0
