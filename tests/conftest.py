"""Every test sees eight simulated CPU devices, so that sharding is tested wherever the tests run."""

import gc
import os
from collections.abc import Iterator
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu, installed to compile for a TPU, must not look for one
os.environ.setdefault(  # compiling takes longer than running here; later versions of jaxlib do not know the second flag
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10."),
)

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """What a module leaves behind (compiled functions, above all) need not be searched for garbage ever after."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def forgotten(request: pytest.FixtureRequest) -> Iterator[None]:
    """A slow test's compiled programs go with it: Linux maps 65,530 pieces of memory a process, a program takes dozens,
    and the next compilation would be aborted."""
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
