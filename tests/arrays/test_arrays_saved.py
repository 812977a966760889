"""Leaves through orbax and `jax.export`, with their types; what trees of them hold; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import export
from leaves import KINDS, quantized, sparse

from jaxcompress.arrays import Codebook, Quantized, Sparse, compressed, dense, is_leaf, nbytes


@pytest.mark.parametrize("kind", [*KINDS, "groups"])
def test_orbax_keeps_types_and_bits(kind, tmp_path):
    w = quantized((12, 10), group=(-2, 4), dtype="bfloat16") if kind == "groups" else KINDS[kind]((12, 10))
    tree = {"layer": {"kernel": w, "bias": jnp.ones(10)}}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "step", tree)
        saver.wait_until_finished()
        back = saver.restore(tmp_path / "step", jax.eval_shape(lambda: tree))
    assert type(back["layer"]["kernel"]) is type(w)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert [x.dtype for x in jax.tree.leaves(back)] == [x.dtype for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("kind", KINDS)
def test_export_with_leaves_as_arguments(kind, rng):
    w, x = KINDS[kind]((12, 10)), jnp.asarray(rng.normal(size=(6, 12)), jnp.float32)
    run = jax.jit(compressed(lambda w, x: x @ w, strict=True))
    loaded = export.deserialize(export.export(run)(w, x).serialize())
    np.testing.assert_allclose(loaded.call(w, x), run(w, x), rtol=1e-6)


def test_nbytes_counts_what_is_stored():
    assert nbytes(quantized((64, 32))) == 64 * 32 + 32 * 4
    assert nbytes(quantized((64, 32), bits=4)) == 64 * 32 // 2 + 32 * 4
    assert nbytes(quantized((64, 32), bits=4, asymmetric=True)) == 64 * 32 // 2 + 32 * 5
    w = sparse((64, 32))
    assert nbytes(w) == 64 * 32 // 8 + 4 * int(jnp.count_nonzero(w.materialise()))
    assert nbytes({"a": jnp.ones(3, jnp.bfloat16), "b": None, "c": jnp.ones(3, jnp.int4)}) == 6 + 2
    assert nbytes({"a": jnp.ones(5, jnp.int2), "b": jnp.ones(3, jnp.float4_e2m1fn)}) == 2 + 2
    assert nbytes(jax.eval_shape(lambda: quantized((64, 32)))) == 64 * 32 + 32 * 4
    assert nbytes(jax.random.key(0)) == 8


def test_ninety_per_cent_sparse_takes_the_documented_share():
    w = jnp.where(jnp.arange(80_000).reshape(100, 800) % 10 == 0, 1.0, 0.0)
    assert w.nbytes / nbytes(Sparse.from_dense(w)) == pytest.approx(7.6, abs=0.05)


def test_dense_leaves_other_leaves_alone():
    tree = {"a": quantized((4, 4)), "b": jnp.ones(2), "c": 3}
    out = dense(tree)
    assert isinstance(out["a"], jax.Array) and out["b"] is tree["b"] and out["c"] == 3
    assert [is_leaf(x) for x in jax.tree.leaves(tree, is_leaf=is_leaf)] == [True, False, False]


@pytest.mark.parametrize("dtype", ["bool", "int4", "uint8", "float8_e4m3fn", "complex64"])
def test_sparse_keeps_the_dtype(dtype):
    array = jnp.asarray([[1, 0, 1]]).astype(dtype)
    found = Sparse.from_dense(array).materialise()
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16])
def test_sparse_round_trip(length, rng):
    array = np.where(rng.random((5, length)) < 0.5, rng.normal(size=(5, length)), 0).astype(np.float32)
    np.testing.assert_array_equal(Sparse.from_dense(array).materialise(), array)


def test_sparse_keeps_masked_zeros_and_drops_the_rest():
    array = jnp.asarray([[1.0, 0.0, 3.0]])
    w = Sparse.from_dense(array, jnp.asarray([[True, True, False]]))
    np.testing.assert_array_equal(w.materialise(), [[1.0, 0.0, 0.0]])
    assert w.values.shape == (2,)
    np.testing.assert_array_equal(Sparse.from_dense(jnp.zeros((3, 4))).materialise(), np.zeros((3, 4)))


def test_sparse_refuses():
    with pytest.raises(ValueError, match=r"mask of shape \(2,\) for an array of shape \(3,\)"):
        Sparse.from_dense(jnp.ones(3), jnp.ones(2, bool))
    with pytest.raises(ValueError, match="no axis behind"):
        Sparse.from_dense(jnp.ones(3), stacked=1)
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="has no elements"):
            Sparse.from_dense(jnp.zeros(shape))
    with pytest.raises(TypeError, match="outside"):
        jax.jit(Sparse.from_dense)(jnp.ones(3))


def test_from_codes_refuses():
    codes = jnp.zeros((4, 6), jnp.int8)
    with pytest.raises(ValueError, match="bits=5"):
        Quantized.from_codes(codes, jnp.ones((1, 6)), bits=5)
    for shape in [(6,), (1, 3), (2, 6)]:
        with pytest.raises(ValueError, match="does not fit codes"):
            Quantized.from_codes(codes, jnp.ones(shape))
    for wrong, bits in [(8, 4), (-9, 4), (2, 2), (128, 8), (0.5, 8), (jnp.nan, 8)]:
        with pytest.raises(ValueError, match=f"codes of {bits} bits are integers from"):
            Quantized.from_codes(jnp.full((4, 6), wrong), jnp.ones((1, 6)), bits=bits)
    for wrong in (128, 0.5):
        with pytest.raises(ValueError, match="zero point is an integer"):
            Quantized.from_codes(codes, jnp.ones((1, 6)), jnp.full((1, 6), wrong))
    with pytest.raises(ValueError, match=r"zero point of shape \(6,\) does not fit"):
        Quantized.from_codes(codes, jnp.ones((1, 6)), jnp.zeros(6))


def test_constants_of_a_traced_function_make_leaves():
    codes = jnp.ones((4, 6), jnp.int8)

    @jax.jit
    def product(x):
        leaves = (Quantized.from_codes(codes, jnp.ones((1, 6))), Codebook.from_indices(codes, jnp.ones((1, 1, 2))))
        return [compressed(jnp.matmul)(x, w) for w in leaves]

    for found in product(jnp.ones((2, 4))):
        np.testing.assert_array_equal(found, 4)
