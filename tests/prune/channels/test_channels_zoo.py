"""The smaller model equals the one with zeroed units, forward and gradient, for the architectures that people prune."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels_zoo import ZOO

from jaxcompress.prune import channels
from jaxcompress.prune.channels._shrink import relative_difference

FAST = {"mlp"}
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]


def some_units(groups, seed, share=0.5):
    """A random choice of units of every exact group, at least one of each."""
    rng = np.random.default_rng(seed)
    return {
        group.name: rng.choice(group.size, max(1, min(group.size - 1, round(share * group.size))), replace=False)
        for group in groups
        if group.exact
    }


def check(fn, params, args, seed=0):
    groups = channels.groups(fn, params, *args)
    assert any(group.exact for group in groups), str(groups)
    plan = channels.from_units(groups, some_units(groups, seed))
    found = channels.verify(fn, params, plan, *args)
    assert found.ok, f"{found}\n{plan}\n{groups}"
    return groups, plan


@pytest.mark.parametrize("name", NAMES)
def test_oracle(name):
    fn, params, args = ZOO[name]()
    for seed in range(1 if name in FAST else 2):
        check(fn, params, args, seed)


@pytest.mark.parametrize("name", NAMES)
def test_oracle_without_jit(name):
    """`verify` compiles both models; here each operation runs by itself, forward and backward."""
    fn, params, args = ZOO[name]()
    groups = channels.groups(fn, params, *args)
    plan = channels.from_units(groups, some_units(groups, 2))
    wanted, of_mask = eagerly(fn, plan.mask(params), args)
    found, of_small = eagerly(channels.shrink(fn, params, plan), plan.apply(params), args)
    assert relative_difference(wanted, found) < 1e-5
    scale = max(np.abs(x).max() for x in jax.tree.leaves(of_small))
    for a, b in zip(jax.tree.leaves(plan.apply(of_mask)), jax.tree.leaves(of_small), strict=True):
        assert relative_difference(a, b, scale) < 1e-5


def eagerly(fn, params, args):
    """The output and the gradient of a random sum of it."""

    def total(params):
        out = fn(params, *args)
        return jnp.vdot(np.random.default_rng(0).normal(size=out.shape).astype(np.float32), out), out

    gradient, out = jax.grad(total, has_aux=True)(params)
    return jax.device_get((out, gradient))
