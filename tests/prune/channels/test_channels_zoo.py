"""The smaller model equals the one with zeroed units, forward and gradient, for the architectures that people prune."""

import numpy as np
import pytest
from channels_zoo import ZOO

from jaxcompress.prune import channels

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
