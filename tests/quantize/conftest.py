"""What several of these tests quantize."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x)).mean((1, 2))
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(16)(x))
        return nn.Dense(5, name="head")(x)


@pytest.fixture
def net(rng):
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 2)), jnp.float32)
    return Net(), jax.jit(Net().init)(jax.random.key(0), x), x
