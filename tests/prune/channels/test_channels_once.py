"""Values that are computed once: which they are, that they stay what they were, and that XLA no longer repeats them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.prune import channels
from jaxcompress.prune.channels import _run
from jaxcompress.prune.channels._once import once, shared
from jaxcompress.prune.channels._trace import trace

WIDTH, ROWS = 64, 32


def stream(depth, end=lambda x: x):
    """A stream of residuals, its parameters and its input."""
    params = [{"w": jnp.full((WIDTH, WIDTH), 0.01), "b": jnp.ones(WIDTH)} for _ in range(depth)]

    def fn(params, x):
        for p in params:
            x = end(x + jnp.tanh(x * x.mean(-1, keepdims=True)) @ p["w"] + p["b"])
        return x.sum(0)

    return fn, params, jnp.ones((ROWS, WIDTH))


def found_in(fn, *args):
    return shared(trace(fn, args[0], args[1:]).tape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_changes_and_the_derivative_is_one(rng, dtype):
    x = jnp.asarray([*rng.normal(size=9), jnp.inf, -jnp.inf, jnp.nan, 0, -0.0], dtype)
    for run in (once, jax.jit(once), jax.vmap(once)):
        np.testing.assert_array_equal(run(x).astype(jnp.float32), x.astype(jnp.float32))
    np.testing.assert_array_equal(jax.grad(lambda x: once(x).sum())(x), jnp.ones_like(x))
    assert once(x).dtype == dtype


def test_which_values_are_computed_once():
    a, b, bias = jnp.ones((ROWS, WIDTH)), jnp.ones((ROWS, WIDTH)), jnp.ones(WIDTH)

    def used_twice(of):
        def fn(a, b, bias):
            y = of(a, b, bias)
            return y.sum(-2), y.max(-1)

        return len(found_in(fn, a, b, bias))

    assert used_twice(lambda a, b, bias: a + b + bias) == 1
    assert used_twice(lambda a, b, bias: jax.nn.relu(a + b)) == 1
    assert used_twice(lambda a, b, bias: (2 * a + jnp.exp(b))[None] ** 2) == 1
    assert used_twice(lambda a, b, bias: a + (b + bias)) == 0, "XLA itself computes what reads two arrays once"
    assert used_twice(lambda a, b, bias: jax.nn.relu(a + bias)) == 0, "from one array it may well be computed again"
    assert used_twice(lambda a, b, bias: jax.nn.relu(a @ b.T + bias[:ROWS])) == 0
    assert used_twice(lambda a, b, bias: jax.nn.relu(a[:2] + b[:2])) == 0, "too small"
    assert len(found_in(lambda a, b: jax.nn.relu(a + b).sum(0), a, b)) == 0, "used once"


@pytest.mark.parametrize("end", [lambda x: x, jax.nn.relu])
def test_the_operands_of_the_compiled_loops_do_not_grow_with_the_depth(monkeypatch, end):
    def most(depth):
        fn, params, x = stream(depth, end)
        plan = channels.from_units(channels.groups(fn, params, x), {})
        small = jax.jit(channels.shrink(fn, params, plan))
        text = small.lower(plan.apply(params), x).compile().as_text()
        return max(len(found[1].split(",")) for found in re.finditer(r" fusion\(([^)]*)\)", text))

    if jax.default_backend() != "cpu":
        pytest.skip("XLA for CPUs")
    assert most(3) == most(6)
    monkeypatch.setattr(_run, "shared", lambda tape: set())
    assert most(3) < most(6), "XLA no longer repeats them: `_once` can go"


def test_a_stream_of_residuals_cut_is_the_one_with_zeroed_units(rng):
    _, params, x = stream(3)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape, scale=0.1), jnp.float32), params)
    inner = [p | {"up": jnp.asarray(rng.normal(size=(WIDTH, 48)), jnp.float32)} for p in params]

    def fn(params, x):
        for p in params:
            h = jax.nn.relu(x @ p["up"])
            x = jax.nn.relu(x + h @ p["up"].T @ p["w"] + p["b"])
        return x.sum(0)

    groups = channels.groups(fn, inner, x)
    plan = channels.plan(groups, channels.random(groups, jax.random.key(0)), ratio=0.5)
    assert channels.verify(fn, inner, plan, x).ok
    again = channels.groups(channels.shrink(fn, inner, plan), plan.apply(inner), x)
    assert sorted(g.size for g in again) == [24, 24, 24] and not again.unknown
