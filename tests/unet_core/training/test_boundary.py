import numpy as np
import pytest

from tests.reference import boundary as reference
from unet_core.training.boundary import boundary_term, objects_of


def discs(*centres, radius=4, shape=(30, 36)):
    y, x = np.mgrid[: shape[0], : shape[1]]
    objects = np.zeros(shape, dtype=np.int32)
    for number, (cy, cx) in enumerate(centres, start=1):
        objects[np.hypot(y - cy, x - cx) <= radius] = number
    return objects


SCENES = {
    "several": discs((8, 8), (8, 20), (22, 14), (25, 30)),
    "one": discs((12, 12)),
    "none": discs(),
    "touching": discs((12, 10), (12, 17), radius=5),
    "at the edge": discs((0, 0), (0, 12), (29, 35)),
    "inside another": np.pad(np.full((10, 10), 2), 6, constant_values=1),
    "everything": np.ones((8, 9), dtype=np.int32),
    "ids with gaps": discs((8, 8), (8, 20)) * 7,
}


@pytest.mark.parametrize("sigma", [1.5, 5.0])
@pytest.mark.parametrize("objects", SCENES.values(), ids=SCENES)
def test_the_weight_map_is_that_of_its_definition(objects, sigma):
    found, expected = boundary_term(objects, sigma), reference.boundary_term(objects, sigma)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_random_scenes_agree_too(seed):
    random = np.random.default_rng(seed)
    objects = random.integers(0, 3, (14, 17)) * random.integers(0, 3, (14, 17))
    expected = reference.boundary_term(objects, 2.0)
    np.testing.assert_allclose(boundary_term(objects, 2.0), expected, atol=1e-6)


def test_a_gap_weighs_more_the_narrower_it_is():
    def at_the_middle(gap):
        return boundary_term(discs((14, 8), (14, 17 + gap), shape=(30, 40)), 5.0)[14, 12 + gap // 2]

    assert at_the_middle(1) > at_the_middle(4) > at_the_middle(9) > 0


def test_objects_of_a_mask_are_its_connected_components_by_class():
    labels = np.array([[1, 1, 0, 2], [0, 0, 0, 2], [1, 255, 255, 2], [1, 0, 1, 1]])
    objects = objects_of(labels, ignore_index=255)
    assert [sorted(set(objects[labels == label])) for label in (0, 255)] == [[0], [0]]
    assert len(set(objects[labels == 1])) == 3
    assert len(set(objects[labels == 2])) == 1
