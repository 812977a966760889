"""Windows' extrema written as slices give what `lax` gives, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress.prune.channels._pool import pool


def ours(fn):
    """`fn` with its windows as the smaller model has them."""

    def run(x):
        (eqn,) = jax.make_jaxpr(fn)(x).eqns
        return pool(eqn.primitive, x, eqn.params)

    return run


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize(
    ("shape", "window", "strides", "way", "plain"),
    [
        ((2, 7, 6, 3), (1, 3, 3, 1), (1, 2, 2, 1), {"padding": "SAME"}, False),
        ((2, 7, 6, 3), (1, 2, 3, 1), (1, 2, 1, 1), {"padding": "VALID"}, False),
        ((2, 9, 8, 3), (1, 3, 2, 1), (1, 1, 3, 1), {"padding": "SAME"}, False),
        ((2, 9, 3), (1, 3, 1), (1, 2, 1), {"padding": ((0, 0), (2, 0), (0, 0))}, False),
        ((2, 7, 6, 3), (1, 2, 2, 1), (1, 1, 1, 1), {"padding": "SAME", "base_dilation": (1, 2, 1, 1)}, True),
        ((2, 7, 6, 3), (1, 1, 2, 2), (1, 1, 1, 1), {"padding": "VALID"}, True),
        ((2, 9, 9, 3), (1, 7, 7, 1), (1, 1, 1, 1), {"padding": "SAME"}, True),
    ],
)
def test_windows_as_slices(rng, kind, shape, window, strides, way, plain):
    x = jnp.asarray(rng.integers(-3, 3, shape), jnp.float32)  # with many ties: the first one gets the gradient
    reducer, start = (lax.max, -jnp.inf) if kind == "max" else (lax.min, jnp.inf)

    def windows(x):
        return lax.reduce_window(x, start, reducer, window, strides, **way)

    weights = jnp.asarray(rng.normal(size=windows(x).shape), jnp.float32)

    @jax.jit
    def both(x):
        def of(fn):
            return fn(x), jax.vmap(fn)(x[None]), jax.grad(lambda x: (weights * fn(x)).sum())(x)

        return of(ours(windows)), of(windows)

    jax.tree.map(np.testing.assert_array_equal, *both(x))
    np.testing.assert_array_equal(ours(windows)(x.astype(jnp.bfloat16)), windows(x.astype(jnp.bfloat16)))
    assert ("reduce_window" in jax.jit(ours(windows)).lower(x).as_text()) == plain


def test_windows_with_holes_stay():
    def windows(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "VALID", window_dilation=(1, 2, 1))

    assert "reduce_window" in jax.jit(ours(windows)).lower(jnp.ones((2, 5, 3))).as_text()


def test_integers_and_what_is_not_a_number(rng):
    def windows(x):
        init = jnp.iinfo(x.dtype).min if jnp.issubdtype(x.dtype, jnp.integer) else -jnp.inf
        return lax.reduce_window(x, np.asarray(init, x.dtype), lax.max, (1, 2, 1), (1, 2, 1), "SAME")

    for x in (jnp.arange(30).reshape(2, 5, 3), jnp.full((2, 5, 3), jnp.nan), jnp.full((2, 5, 3), -jnp.inf)):
        np.testing.assert_array_equal(ours(windows)(x), windows(x))
