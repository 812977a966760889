"""Leaves of every class, every container and odd kinds of numbers, in a file that version 0.1.0 wrote.

`leaves_v1.jxc` is what `python tests/pack/test_pack_golden_leaves.py` wrote then. It stays as it is: what is new gets a
file of its own.
"""

import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxcompress import pack
from jaxcompress.arrays import Codebook, Leaf, LowRank, Quantized, Sparse
from jaxcompress.quantize._float_products import FloatProduct

FILE = Path(__file__).parent / "leaves_v1.jxc"
METADATA = {"made": "by 0.1.0", "accuracy": 0.97, "of": ["a", None, True]}


def codes(bits, *shape):
    """Integers of so many bits, all of them, in no order that packs well."""
    i = np.arange(math.prod(shape))
    return jnp.asarray(((i * i * 7 + i * 3) % 2**bits - 2 ** (bits - 1)).reshape(shape), jnp.int8)


def numbers(*shape, dtype=jnp.float32):
    """Multiples of 1/8, which every float type but the smallest holds."""
    i = np.arange(math.prod(shape))
    return jnp.asarray(((i * 5 % 31) - 15).reshape(shape) / 8, dtype)


def quantized_leaves():
    steps = jnp.abs(numbers(1, 5)) + 0.25
    powers = jnp.full((1, 5), 0.5).astype(jnp.float8_e8m0fnu)
    small = {"zero_point": None, "bits": 8, "length": None, "compute_dtype": "float16"}
    return {
        "zero point": Quantized.from_codes(codes(8, 6, 5), steps, codes(4, 1, 5)),
        "groups": Quantized.from_codes(codes(4, 6, 5), numbers(2, 5) + 3, bits=4, group=(-2, 4), dtype=jnp.bfloat16),
        "two bits": Quantized.from_codes(codes(2, 6, 5), steps, bits=2, activation_bits=8),
        "static": Quantized.from_codes(
            codes(8, 6, 5),
            steps,
            activation_bits=8,
            input_scale=jnp.full((1, 1), 0.125),
            input_zero_point=jnp.full((1, 1), -3.0),
        ),
        "outputs first": Quantized.from_codes(codes(8, 6, 5), steps).outputs_first(),
        "int4": Quantized.from_codes(codes(4, 6, 5), steps, bits=4).as_int4(),
        "int2": Quantized.from_codes(codes(2, 6, 5), steps, bits=2).as_int4(),
        "table": Quantized.from_codes(codes(4, 6, 5), steps, bits=4, levels=tuple(i / 4 for i in range(16))),
        "float8": Quantized(values=numbers(6, 5).astype(jnp.float8_e4m3fn), scale=powers, **small),
        "float products": FloatProduct(numbers(6, 5).astype(jnp.float8_e5m2), steps, "float32", "float8_e4m3fn"),
    }


def other_leaves():
    return {
        "signs": Codebook.from_indices(codes(1, 3, 5) + 1, numbers(1, 5, 2)),
        "ternary": Codebook.from_indices((codes(8, 3, 5) + 128) % 3, numbers(1, 1, 3), keep_zeros=True),
        "shared": Codebook.from_indices(codes(4, 3, 5) + 8, numbers(1, 1, 16, dtype=jnp.bfloat16)),
        "large": Codebook.from_indices(codes(8, 3, 5).astype(jnp.uint8), numbers(3, 1, 256)),
        "sparse": Sparse.from_dense(jnp.where(codes(2, 3, 11) == 1, numbers(3, 11), 0)),
        "sparse stack": Sparse.from_dense(jnp.where(codes(2, 2, 3, 5) == 1, numbers(2, 3, 5), 0), stacked=1),
        "low rank": LowRank.from_factors(numbers(2, 4, 2), numbers(2, 2, 3), stacked=1),
        "turned": LowRank.from_factors(numbers(3, 2), numbers(2, 4, 5), left_axes=(-1,)),
        "small factors": LowRank.from_factors(
            Quantized.from_codes(codes(8, 6, 2), jnp.full((1, 2), 0.5)), numbers(2, 4), left_axes=(0,)
        ),
    }


def plain_values():
    floats = [kind for kind in pack._arrays.DTYPES if kind.startswith(("float", "bfloat"))]
    return {
        "keys": [{"": 1, "a/b~c": 2, "[0]": 3, "#7": 4, "(x": 5}, {7: 1, -1: 2}],
        "containers": ([], (), {}, [1, (2, {"x": None})], ((3,),)),
        "numbers": [True, 2**40, 0.1, -0.0, math.inf, -math.inf, math.nan, 1 - 2j, None],
        "floats": {kind: np.array([1, 2, 4], getattr(ml_dtypes, kind, kind)) for kind in floats},
        "integers": {kind: np.array([0, 1], kind) for kind in ("bool", "int16", "uint32", "int64", "uint64")},
        "narrow": {kind: np.array([1, 0, 1], getattr(ml_dtypes, kind)) for kind in ("int2", "uint2", "int4", "uint4")},
        "complex": np.array([[1 + 2j, -3j]], np.complex64),
        "scalar": np.array(3.5),
        "empty": [np.zeros((0, 3), np.float16), np.zeros((2, 0, 3), ml_dtypes.int4)],
        "key": jax.random.key(5),
        "keys of another kind": jax.random.split(jax.random.key(6, impl="rbg"), 2),
    }


def golden_tree():
    return {"quantized": quantized_leaves(), "others": other_leaves(), "plain": plain_values()}


def parts(tree):
    """Structure (with the static fields of leaves), and arrays as NumPy has them; keys by their data."""
    leaves, structure = jax.tree.flatten(tree)
    keys = [isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return structure, [np.asarray(jax.random.key_data(x) if k else x) for x, k in zip(leaves, keys, strict=True)]


def test_what_version_0_1_0_wrote_is_read_to_the_bit():
    found, expected = pack.load(FILE), golden_tree()
    (structure, arrays), (wanted, originals) = parts(found), parts(expected)
    assert structure == wanted
    for a, b in zip(arrays, originals, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
    assert pack.load_metadata(FILE) == METADATA
    key, same = found["plain"]["keys of another kind"], expected["plain"]["keys of another kind"]
    assert jax.random.key_impl(key) == jax.random.key_impl(same)


def test_it_has_every_class_of_leaves_that_files_hold():
    kept = {type(x) for x in jax.tree.leaves(golden_tree(), is_leaf=lambda x: isinstance(x, Leaf))}
    public = {cls for name, cls in Leaf.registry.items() if cls.__module__.startswith("jaxcompress.arrays.")}
    assert {cls.__name__ for cls in public - kept} == {"Moved"}  # which lives for one product


def test_a_process_that_knows_of_files_alone_reads_it():
    code = f"from jaxcompress import pack; pack.load({str(FILE)!r})"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


if __name__ == "__main__":
    print(pack.save(FILE, golden_tree(), METADATA), "bytes")
