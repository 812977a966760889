"""Every test sees eight simulated CPU devices, so that sharding is tested wherever the tests run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu, installed to compile for a TPU, must not look for one

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
