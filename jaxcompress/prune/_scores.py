"""Scores: how much each weight matters. The lowest are pruned first."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Score = Callable[[jax.Array], jax.Array]
"""Of a weight, its scores: same shape, floating point, the lowest are pruned first."""


def magnitude(weight: jax.Array) -> jax.Array:
    """The absolute value of each weight (Han et al. 2015, "Learning both Weights and Connections")."""
    return jnp.abs(weight)
