"""What the wrappers of module systems share: new state that may shrink, and how far two results are apart."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from jaxcompress.prune.channels._plan import Plan
from jaxcompress.prune.channels._shrink import largest, relative_difference


def with_state_freed(plan: Plan) -> Plan:
    """The plan for a function that returns `(out, new state, a scalar)`, where new state may shrink too.

    The scalar is there to be matched if there is no new state: a pattern that matches nothing is an error.
    """
    patterns = [pattern for free in plan.free_out for pattern in (free, free.replace("^", "^0/"))]
    return dataclasses.replace(plan, free_out=("|".join(f"(?:{pattern})" for pattern in (*patterns, "^[12]")),))


def difference(expected: Any, got: Any) -> float:
    """The largest difference of any output, relative to its largest value; infinite where shapes differ."""
    pairs = list(zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True))
    if any(np.shape(a) != np.shape(b) for a, b in pairs):
        return math.inf
    return largest(relative_difference(a, b) for a, b in jax.device_get(pairs))
