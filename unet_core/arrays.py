"""One name for arrays, and the legend of the shape suffixes used everywhere.

N images or tiles of a batch · C channels · H rows · W columns · K logits or classes.
``pixels_HWC`` is as decoders give it, ``pixels_CHW`` as networks take it, ``mask_HW`` class ids.
"""

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
"""A NumPy array; its dtype and shape are told by the name or the docstring."""
