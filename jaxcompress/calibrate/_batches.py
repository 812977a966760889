"""A check of what is handed in as batches."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def check_batches(batches: Any) -> None:
    """A TypeError where this is one batch: iterating over it would give its rows, or its names, as batches."""
    if isinstance(batches, jax.Array | np.ndarray | Mapping):
        shape = list(getattr(batches, "shape", ()))
        of_shape = f" of shape {shape}" if shape else ""
        raise TypeError(
            f"batches must be several, in a list or an iterator, got one {type(batches).__name__}{of_shape}: "
            "if that is a batch, hand in [batch]"
        )
