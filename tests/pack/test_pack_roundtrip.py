"""What is saved comes back the same: every dtype, every kind of node, every kind of compressed leaf."""

import json
import math
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.core import ShapedArray
from jax.sharding import NamedSharding

from jaxcompress import pack
from jaxcompress.arrays import Leaf, Quantized, Sparse, compressed, dense, nbytes
from jaxcompress.pack._arrays import DTYPES


class Scaled(Leaf):
    """A leaf for these tests: an inner array or leaf, times a factor, shifted."""

    inner: jax.Array | Leaf
    factor: jax.Array
    shift: jax.Array | None
    windows: tuple = eqx.field(static=True)
    note: str | None = eqx.field(static=True, default=None)

    def aval(self):
        return ShapedArray(self.inner.shape, jnp.float32)

    def materialise(self):
        return dense(self.inner) * self.factor + (0 if self.shift is None else self.shift)


def assert_same(a, b):
    """Equal in structure, types, dtypes and bits; arrays may come back as NumPy's."""
    if isinstance(a, Leaf):
        assert type(a) is type(b)
        (children, static), (children_b, static_b) = a.fields(), b.fields()
        assert static == static_b and list(map(type, static.values())) == list(map(type, static_b.values()))
        assert children.keys() == children_b.keys()
        for name, child in children.items():
            assert isinstance(children_b[name], jax.Array | Leaf)
            assert_same(child, children_b[name])
    elif isinstance(a, dict):
        assert type(b) is dict and list(a) == list(b) and list(map(type, a)) == list(map(type, b))
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif hasattr(a, "dtype"):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert (a.dtype.newbyteorder("="), a.shape) == (b.dtype, b.shape)
        a = np.asarray(a)
        assert a.astype(a.dtype.newbyteorder("<")).tobytes() == np.asarray(b).tobytes()
    else:
        assert type(a) is type(b) and repr(a) == repr(b)


def roundtrip(tmp_path, tree):
    size = pack.save(tmp_path / "file.jxc", tree)
    assert size == (tmp_path / "file.jxc").stat().st_size
    return pack.load(tmp_path / "file.jxc")


def any_values(rng, dtype, shape):
    """Arrays of random bits (so with NaNs, infinities, negative zeros), some smooth, some mostly zero."""
    size = math.prod(shape)
    bits = {"bool": 1, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}.get(dtype.name)
    if bits:
        return rng.integers(0, 2**bits, size, dtype=np.uint8).view(dtype).reshape(shape)
    return np.frombuffer(rng.bytes(size * dtype.itemsize), dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_every_dtype_and_shape(tmp_path, rng, dtype):
    tree = [any_values(rng, dtype, shape) for shape in [(), (0,), (3, 0, 2), (1,), (7,), (5, 3), (2, 3, 1, 11), (999,)]]
    for values in ("zeros", "sparse", "smooth"):
        flat = np.zeros(2001) if values == "zeros" else rng.normal(size=2001)
        flat = flat * (rng.uniform(size=2001) < 0.1) if values == "sparse" else flat
        with np.errstate(all="ignore"):
            tree.append(np.abs(flat).astype(dtype) if dtype.kind == "u" else flat.astype(dtype))
    assert_same(tree, roundtrip(tmp_path, tree))


def test_jax_knows_every_dtype_and_all_of_jaxs_that_work_are_here():
    assert all(jnp.dtype(name) == dtype for name, dtype in DTYPES.items())
    for name in ("bfloat16", "int4", "uint4", "int2", "float8_e4m3fn", "float8_e5m2", "complex64", "bool_", "float16"):
        assert jnp.dtype(getattr(jnp, name)).name in DTYPES


def test_loaded_arrays_are_numpys_and_writable(tmp_path, rng):
    tree = {"raw": rng.bytes(64), "coded": np.zeros(5000, np.int8), "planes": rng.normal(size=(50, 40)), "0d": 0}
    tree["raw"], tree["0d"] = np.frombuffer(tree["raw"], np.float64), np.float32(3)
    for array in roundtrip(tmp_path, tree).values():
        assert type(array) is np.ndarray and array.flags.writeable and array.flags.c_contiguous


def test_memory_layout_and_byte_order_do_not_matter(tmp_path, rng):
    x = rng.normal(size=(40, 30)).astype(np.float32)
    tree = [np.asfortranarray(x), x[::2, ::-3], x.astype(">f4"), x.T, np.arange(5, dtype=">i8"), x[3, 4]]
    assert_same(tree, roundtrip(tmp_path, tree))


def test_device_arrays_sharded_ones_and_keys(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    array = jax.random.normal(jax.random.key(0), (16, 24))
    tree = {
        "sharded": jax.device_put(array, NamedSharding(mesh, jax.P("x"))),
        "replicated": jax.device_put(array, NamedSharding(mesh, jax.P())),
        "bfloat16": array.astype(jnp.bfloat16),
        "int4": jnp.arange(-8, 8).astype(jnp.int4),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(7, impl="rbg"), (2, 3)),
    }
    back = roundtrip(tmp_path, tree)
    assert_same(tree, back)
    assert jax.random.normal(back["key"]) == jax.random.normal(tree["key"])


@pytest.mark.parametrize(
    "tree",
    [{}, [], (), None, 0, 1.5, np.ones(3), {"a": {}}, [[], (), {}, None], ({"": ()},), {"": np.ones(2)}, {"": {"": 1}}],
    ids=repr,
)
def test_small_trees(tmp_path, tree):
    assert_same(tree, roundtrip(tmp_path, tree))


KEYS = [
    "a/b",
    "a",
    "",
    "/",
    "~",
    "~0",
    "~1",
    "~2",
    "[0]",
    "(0)",
    "#3",
    "#",
    "~2[0]",
    "Dense_0",
    "å∂",
    "\ud800",
    '"',
    "\\",
]


def test_keys_of_every_kind(tmp_path):
    tree = {key: {other: i for i, other in enumerate(KEYS)} for key in KEYS} | {3: 1, -1: {0: 2, "0": 3}, 10**30: 4}
    assert_same(tree, roundtrip(tmp_path, tree))
    assert_same({"a": {"b": 1}, "a/b": 2}, roundtrip(tmp_path, {"a": {"b": 1}, "a/b": 2}))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers()
arrays = st.builds(
    lambda dtype, shape, seed: any_values(np.random.default_rng(seed), dtype, shape),
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.integers(0, 99),
)
keys = st.sampled_from(KEYS) | st.text(max_size=5) | st.integers()
trees = st.recursive(
    scalars | arrays,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(trees)
def test_any_tree(tmp_path, tree):
    assert_same(tree, roundtrip(tmp_path, tree))


def leaves(rng):
    codes = jnp.asarray(rng.integers(-7, 8, (12, 10)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 1, (1, 10)), jnp.float32)
    groups = jnp.asarray(rng.uniform(0.5, 1, (4, 10)), jnp.float32)
    sparse = jnp.asarray(rng.normal(size=(12, 10)) * (rng.uniform(size=(12, 10)) < 0.2), jnp.float32)
    inner = Quantized.from_codes(codes, scale, bits=4)
    return {
        "int8": Quantized.from_codes(codes, scale),
        "int4": Quantized.from_codes(codes, groups, bits=4, group=(-2, 3)),
        "asymmetric": Quantized.from_codes(codes, scale, jnp.ones((1, 1), jnp.int8), dtype=jnp.bfloat16),
        "integer products": Quantized.from_codes(codes, scale, activation_bits=8),
        "sparse": Sparse.from_dense(sparse),
        "nested": Scaled(inner, jnp.float32(2), None, windows=((1, 2), (3, 4)), note="raw:3"),
        "deeply nested": Scaled(Scaled(inner, scale, scale, ()), jnp.float32(2), jnp.float32(1), (1,)),
    }


@pytest.mark.parametrize("kind", leaves(np.random.default_rng(0)))
def test_compressed_leaves_come_back_and_run(tmp_path, rng, kind):
    leaf = leaves(rng)[kind]
    back = roundtrip(tmp_path, {"w": leaf})["w"]
    assert_same(leaf, back)
    assert jax.tree.structure(back) == jax.tree.structure(leaf)
    np.testing.assert_array_equal(back.materialise(), leaf.materialise())
    x = jnp.asarray(rng.normal(size=(3, 12)), leaf.dtype)
    matmul = compressed(lambda w, x: x @ w)
    np.testing.assert_array_equal(matmul(back, x), matmul(leaf, x))


def test_a_leaf_in_numpy_comes_back_on_the_device(tmp_path, rng):
    leaf = jax.tree.map(np.asarray, leaves(rng)["int4"])
    assert_same(leaf, roundtrip(tmp_path, [leaf])[0])


def test_64_bits_within_a_leaf_ask_for_x64_instead_of_losing_them(tmp_path):
    pack.save(tmp_path / "file", {"w": Scaled(np.ones(3), np.ones(()), None, ())})
    with pytest.raises(pack.PackError, match=r"w .*jax_enable_x64"):
        pack.load(tmp_path / "file")


def test_a_new_process_reads_the_same(tmp_path, rng):
    tree = {"a": rng.normal(size=(64, 64)).astype(np.float32), "b": leaves(rng)["int4"]}
    pack.save(tmp_path / "file", tree)
    code = (
        "import sys, numpy as np; from jaxcompress import pack; t = pack.load(sys.argv[1]);"
        "print(t['a'].tobytes().hex() + np.asarray(t['b'].values).tobytes().hex())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == tree["a"].tobytes().hex() + np.asarray(tree["b"].values).tobytes().hex()


def test_metadata_and_header(tmp_path, rng):
    metadata = {"accuracy": 0.97, "layers": [3, 4], "note": "ü", "none": None}
    tree = {"Dense_0": {"kernel": leaves(rng)["int4"], "bias": np.arange(32, dtype=np.float32)}, "step": 3}
    pack.save(tmp_path / "file", tree, metadata)
    assert pack.load_metadata(tmp_path / "file") == metadata
    header = pack.read_header(tmp_path / "file")
    assert header["metadata"] == metadata
    assert list(header["tree"]) == ["Dense_0/kernel", "Dense_0/bias", "step"]
    kernel = header["tree"]["Dense_0/kernel"]["Quantized"]
    assert (kernel["bits"], kernel["length"], kernel["group"]) == (4, 10, [-2, 3])
    assert kernel["values"].startswith("uint8[12,5] ")
    assert header["tree"]["Dense_0/bias"].startswith("float32[32] ")
    run = subprocess.run(
        [sys.executable, "-m", "jaxcompress.pack", str(tmp_path / "file")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(run.stdout) == header


def test_a_large_files_header_is_plain_text(tmp_path, rng):
    pack.save(tmp_path / "file", {"Dense_0": {"kernel": rng.normal(size=(100, 100))}})
    assert b'"Dense_0/kernel":"float64[100,100] ' in (tmp_path / "file").read_bytes()[:200]


def test_the_same_tree_makes_the_same_bytes(tmp_path, rng):
    tree = {"w": leaves(rng), "x": rng.normal(size=100)}
    pack.save(tmp_path / "a", tree, {"seed": 1})
    pack.save(str(tmp_path / "b"), tree, {"seed": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Sizes


def entropy_bytes(codes):
    _, counts = np.unique(codes, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kept", [1.0, 0.3, 0.1, 0.02])
def test_a_quantized_leaf_costs_its_order_0_entropy(tmp_path, rng, bits, kept):
    largest = 2 ** (bits - 1) - 1
    codes = np.clip(np.round(rng.normal(size=(600, 200)) * largest / 3), -largest, largest)
    codes = (codes * (rng.uniform(size=codes.shape) < kept)).astype(np.int8)
    leaf = Quantized.from_codes(jnp.asarray(codes), jnp.ones((1, 1)), bits=bits)
    size = pack.save(tmp_path / "file", {"w": leaf})
    assert size <= 1.005 * entropy_bytes(codes) + 250


@pytest.mark.parametrize("bits", [8, 4])
def test_overhead_of_a_small_model(tmp_path, rng, bits):
    """Four layers, 5,000 weights, twelve arrays: header, tables and checksums take less than 600 bytes."""
    tree, bound = {}, 0.0
    for i, shape in enumerate([(3, 3, 1, 16), (3, 3, 16, 16), (64, 32), (32, 10)]):
        codes = np.clip(np.round(rng.normal(size=shape) * 2.5), -7, 7).astype(np.int8)
        scale = jnp.asarray(rng.uniform(0.01, 0.02, (1,) * (len(shape) - 1) + shape[-1:]), jnp.float32)
        bias = rng.normal(size=shape[-1]).astype(np.float32)
        tree[f"Layer_{i}"] = {"kernel": Quantized.from_codes(jnp.asarray(codes), scale, bits=bits), "bias": bias}
        bound += entropy_bytes(codes) + scale.nbytes + bias.nbytes
    size = pack.save(tmp_path / "file", {"params": tree}, {"accuracy": 0.97})
    assert size <= bound + 600


def test_pruned_and_dense_floats_shrink(tmp_path, rng):
    weights = rng.normal(size=(300, 300)).astype(np.float32) * 0.05
    assert pack.save(tmp_path / "file", {"w": weights}) <= 0.87 * weights.nbytes
    mask = rng.uniform(size=weights.shape) < 0.1
    ideal = entropy_bytes(mask) + 0.87 * weights[mask].nbytes
    assert pack.save(tmp_path / "file", {"w": np.where(mask, weights, 0)}) <= ideal + 200
    assert pack.save(tmp_path / "file", {"steps": np.arange(10_000)}) <= 0.4 * 80_000


def test_noise_does_not_grow(tmp_path, rng):
    noise = np.frombuffer(rng.bytes(400_000), np.uint8)
    for dtype in (np.uint8, np.int32, np.complex128):
        assert pack.save(tmp_path / "file", {"noise": noise.view(dtype)}) <= noise.nbytes + 150


def test_bytes_in_the_header_add_up(tmp_path, rng):
    tree = {"w": leaves(rng)["int8"], "x": rng.normal(size=1000)}
    size = pack.save(tmp_path / "file", tree)
    text = json.dumps(pack.read_header(tmp_path / "file"))
    lengths = [int(part.split('"')[0].split("+")[0].split(" ")[0]) for part in text.split(":") if part[0].isdigit()]
    assert 0 < size - sum(lengths) < 18 + len(text)
    assert sum(lengths) <= nbytes(tree)
