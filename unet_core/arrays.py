"""One name for arrays, and the legend of the shape suffixes used everywhere.

N images or tiles of a batch · C channels · H rows · W columns · K logits or classes.
``pixels_HWC`` is as decoders give it, ``pixels_CHW`` as networks take it, ``mask_HW`` class ids.
"""

import sys
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
"""A NumPy array; its dtype and shape are told by the name or the docstring."""


class _NoPandas:
    """A finder for which there is none."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name=name)


def leave_pandas_out() -> None:
    """Let pyarrow settle that it has no pandas, which it would import, 0.25 s, for the first list
    that it makes an array of; ``to_pandas`` finds it all the same.

    For processes of our own: of those who import pandas later, it would take a Series for a list.
    """
    import pyarrow as pa

    hidden = _NoPandas()
    sys.meta_path.insert(0, hidden)
    try:
        pa.array([])
    finally:
        sys.meta_path.remove(hidden)
