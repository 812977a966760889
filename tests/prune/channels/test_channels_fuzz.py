"""Random programs agree with the oracle, and the oracle sees faults that are planted in the rules."""

import jax.numpy as jnp
import numpy as np
import pytest
from channels_fuzz import OPS, program

from jaxcompress.prune import channels


def difference(seed, length=6, gradient=True):
    """How far the cut program is from the masked one; None if it has no exact group to cut."""
    fn, params, args = program(seed, length)
    groups = channels.groups(fn, params, *args)
    rng = np.random.default_rng(seed)
    units = {
        g.name: rng.choice(g.size, int(rng.integers(1, g.size)), replace=False)
        for g in groups
        if g.exact and rng.random() < 0.8
    }
    if not units:
        return None
    plan = channels.from_units(groups, units)
    found = channels.verify(fn, params, plan, *args, gradient=gradient)
    assert found.finite, fn.__name__
    return max(found.forward, found.gradient or 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_a_sample(seed):
    found = difference(seed)
    assert found is None or found < 1e-5, program(seed)[0].__name__


@pytest.mark.slow
@pytest.mark.parametrize("block", range(40))
def test_many(block):
    for seed in range(100 + 50 * block, 150 + 50 * block):
        found = difference(seed, length=3 + seed % 5, gradient=seed % 3 == 0)
        assert found is None or found < 3e-5, (seed, program(seed, 3 + seed % 5)[0].__name__)


def test_every_kind_is_drawn():
    drawn = {name for seed in range(300) for name in program(seed)[0].__name__.split("_")}
    assert {part for name in OPS for part in name.split("_")} <= drawn
    assert jnp is not None
