"""What XLA makes of products for a TPU and for a GPU, compiled here without either; and their times where one is.

Counted are the bytes that a program reads from the chip's main memory and writes to it; few rows of inputs take as long
as their weight takes to read. XLA's own cost analysis counts what lies in the chip's own memory too: 336 MB for 67 MB
of int8 codes that were fetched ahead. The weight, of 8192x28672, is too large for that memory once it is decoded.

A TPU needs the libtpu wheel (`jaxcompress[tpu-compile]`), a GPU those of CUDA (`jax[cuda12]`, 5 GB) and, where there is
none, `JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1` in the environment. For a GPU XLA then takes the first kernels that it could
use; where there is one it measures several.
"""

import contextlib
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src import xla_bridge
from jax.experimental import topologies

from benchmarks._harness import Figures, benchmark, exact, faster
from jaxcompress import Codebook, Quantized, compressed, quantize

V5E = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the lock is for those who use a TPU
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment variables from which libtpu knows what to compile for."""
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
}
"""
"""What XLA asks a GPU for, as its `GpuTargetConfigProto`."""
SIZE, ROWS = (8192, 28672), (1, 16)
SCHEMES: dict[str, quantize.Scheme] = {
    "int8": quantize.Affine(bits=8),
    "int8_int8": quantize.Affine(bits=8, activation_bits=8),
    "int8_groups": quantize.Affine(bits=8, group=(0, 128)),
    "int4": quantize.Affine(bits=4),
    "int4_groups": quantize.Affine(bits=4, group=(0, 128)),
    "int4_groups_zero": quantize.Affine(bits=4, group=(0, 128), symmetric=False),
    "nf4": quantize.NF4(),
    "binary": quantize.Binary(),
    "ternary": quantize.Ternary(),
}


@benchmark("quantize.tpu")
def _tpu(rounds: int) -> Figures:
    """How many times fewer bytes than in bfloat16 a product of few rows moves, compiled for a TPU v5e."""
    return _fewer(tpus()[0], (16, 128))


@benchmark("quantize.cuda")
def _cuda(rounds: int) -> Figures:
    """The same compiled for a GPU: the one that is there, else an H100."""
    with gpu() as chip:
        return _fewer(chip, (16, 256))


@benchmark("quantize.accelerator")
def _accelerator(rounds: int) -> Figures:
    """How many times faster than in bfloat16 these products are on the GPU or TPU that is there; of 4096 rows too."""
    if jax.default_backend() == "cpu":
        raise ModuleNotFoundError("it needs a GPU or a TPU, and JAX's wheels for it")
    weight = jax.random.normal(jax.random.key(0), SIZE, jnp.bfloat16)
    kinds = _kinds(weight, (16, 256))
    figures = {}
    for rows in (*ROWS, 4096):
        x = jax.random.normal(jax.random.key(1), (rows, SIZE[0]), jnp.bfloat16)
        product = jax.jit(compressed(jnp.dot))
        for name, small in kinds.items():
            ours, theirs = functools.partial(product, x, small), functools.partial(product, x, weight)
            figures[f"{name}.{rows}"] = faster(ours, theirs, "bfloat16 product", rounds)
    return figures


def _kinds(weight: Any, centroids: tuple[int, ...]) -> dict[str, Any]:
    """The weight, an array or a shape, in every format."""
    as_shape = isinstance(weight, jax.ShapeDtypeStruct)

    def made(convert: Callable[..., Any], *args: Any) -> Any:
        return jax.eval_shape(convert, *args) if as_shape else convert(*args)

    def codebook(weight: jax.Array, k: int) -> Codebook:
        indices = jnp.abs(weight * 1000).astype(jnp.uint8) % k
        return Codebook.from_indices(indices, jnp.linspace(-1, 1, k, dtype=weight.dtype)[None, None])

    kinds = {name: made(scheme.convert, weight) for name, scheme in SCHEMES.items()}
    kinds |= {f"{name}.as_int4": made(Quantized.as_int4, w) for name, w in kinds.items() if w.bits == 4}
    return kinds | {f"codebook_{k}": made(functools.partial(codebook, k=k), weight) for k in centroids}


def _fewer(device: Any, centroids: tuple[int, ...]) -> Figures:
    chip = jax.sharding.SingleDeviceSharding(device)
    weight = jax.ShapeDtypeStruct(SIZE, jnp.bfloat16)

    def moved(rows: int, weight: Any) -> tuple[float, int]:
        x = jax.ShapeDtypeStruct((rows, SIZE[0]), jnp.bfloat16, sharding=chip)
        there = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=chip), weight)
        compiled: Any = jax.jit(compressed(jnp.dot)).lower(x, there).compile()
        return moved_bytes(compiled.as_text()), compiled.memory_analysis().temp_size_in_bytes

    kinds = _kinds(weight, centroids)
    figures = {}
    for rows in ROWS:
        whole, _ = moved(rows, weight)
        for name, small in kinds.items():
            ours, temp = moved(rows, small)
            figures[f"{name}.{rows}"] = exact(whole / ours, "x fewer", "bfloat16 product", bytes=ours, temp=temp)
    return figures


def tpus() -> list[Any]:
    """The devices of a v5e slice that is only described."""
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("compiling for a TPU needs the libtpu wheel: pip install 'jaxcompress[tpu-compile]'")
    for name, value in V5E.items():
        os.environ.setdefault(name, value)
    return list(topologies.get_topology_desc("v5e:2x4", platform="tpu").devices)


@contextlib.contextmanager
def gpu() -> Iterator[Any]:
    """The GPU that is there, or an H100 that is only described."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ModuleNotFoundError("compiling for a GPU needs the wheels of CUDA: pip install 'jax[cuda12]'")
    try:
        yield jax.devices("cuda")[0]
        return
    except RuntimeError:
        pass  # there is none
    known = xla_bridge.canonicalize_platform

    def named(platform: str) -> str:  # JAX wants a GPU to be there for it to be called by its name: jax-ml/jax#23971
        return "cuda" if platform in ("cuda", "gpu") else known(platform)

    with mock.patch.object(xla_bridge, "canonicalize_platform", named):
        yield topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]


_STEP = re.compile(r"\s*(?:ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]\{([^}]*)\}")
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-done", "slice-done", "async-done"}


def moved_bytes(hlo: str) -> float:
    """The bytes that a program compiled for a TPU or GPU reads from main memory and writes to it.

    Each step of its entry computation reads its operands once and writes its results; a type that says `S(1)` lies in
    a TPU's own memory. What a step reads in part counts whole.
    """
    entry = hlo[hlo.index("\nENTRY") :]
    types: dict[str, str] = {}
    total = 0.0
    for step in map(_STEP.match, entry[: entry.index("\n}")].splitlines()):
        if step is None:
            continue
        name, type_, kind, operands = step.groups()
        types[name] = type_
        if kind.endswith("-start"):  # its type has the source and the target
            total += _bytes(type_)
        elif kind not in _FREE:
            total += _bytes(type_) + sum(_bytes(types.get(operand.strip(), "")) for operand in operands.split(","))
    return total


def _bytes(type_: str) -> float:
    """Of the arrays of a type that lie in main memory."""
    total = 0.0
    for dtype, shape, layout in _ARRAY.findall(type_):
        if "S(" not in layout:
            bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
            total += bits / 8 * math.prod(int(n) for n in shape.split(",") if n)
    return total
