"""What XLA makes of products for a TPU, compiled here without one by the libtpu wheel (`jaxcompress[tpu-compile]`).

The bytes are those of XLA's cost analysis for a weight of 8192x8192. They are read at one row of inputs, where a
product takes as long as its weight takes to read. With more rows XLA fetches the weight ahead into the chip's own
memory, and the analysis counts those copies too.
"""

import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks._harness import Figures, benchmark, exact
from jaxcompress import compressed, quantize

DESCRIBED = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the lock is for those who use a TPU
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment variables from which libtpu knows what to compile for."""


@benchmark("quantize.tpu")
def _tpu(rounds: int) -> Figures:
    """How many times fewer bytes a product of one row moves than in bfloat16, compiled for a TPU v5e."""
    size = 8192
    for name, value in DESCRIBED.items():
        os.environ.setdefault(name, value)
    chip = jax.sharding.SingleDeviceSharding(chips()[0])
    row = jax.ShapeDtypeStruct((1, size), jnp.bfloat16, sharding=chip)
    weight = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)

    def moved(weight: Any) -> tuple[float, int]:
        there = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=chip), weight)
        compiled: Any = jax.jit(compressed(jnp.dot)).lower(row, there).compile()
        return compiled.cost_analysis()["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes

    whole, _ = moved(weight)
    schemes = {
        "int8": quantize.Affine(bits=8),
        "int8_int8": quantize.Affine(bits=8, activation_bits=8),
        "int4": quantize.Affine(bits=4),
        "int4_groups": quantize.Affine(bits=4, group=(0, 128)),
    }
    figures = {}
    for name, scheme in schemes.items():
        ours, temp = moved(jax.eval_shape(scheme.convert, weight))
        figures[name] = exact(whole / ours, "x fewer", "bfloat16 product", bytes=ours, temp=temp)
    return figures


def chips() -> list[Any]:
    """The devices of a v5e slice that is only described; `DESCRIBED` must be in the environment."""
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("compiling for a TPU needs the libtpu wheel: pip install 'jaxcompress[tpu-compile]'")
    return list(topologies.get_topology_desc("v5e:2x4", platform="tpu").devices)
