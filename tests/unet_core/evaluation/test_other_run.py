import numpy as np

from tests.support.rasters import assert_windows_are_cuts
from unet_core.evaluation.other_run import _raster
from unet_core.runs.reader import StoredMask
from unet_core.tiling.geometry import Box


def test_a_stored_mask_is_a_raster():
    mask_HW = np.random.default_rng(0).integers(0, 300, (90, 70), dtype=np.uint16)
    boxes = [
        Box(y, x, min(40, 90 - y), min(40, 70 - x)) for y in (0, 40, 80) for x in (0, 40)
    ]  # of a format whose windows have 40 pixels
    windows = {box: lambda box=box: mask_HW[box.slices] for box in boxes}
    raster = _raster(StoredMask("a", 90, 70, windows))
    assert raster.segment_side == (40, 40)
    assert_windows_are_cuts(raster, mask_HW[None])
