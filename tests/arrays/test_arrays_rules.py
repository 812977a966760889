"""Each rule against the same function on the dense value, and each hit counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from leaves import KINDS, low_rank, quantized, sparse

from jaxcompress import quantize
from jaxcompress.arrays import LowRank, MadeDenseError, Quantized, Sparse, _sparse_rules, compressed, dense, watch


def check(fn, *args, tolerance=1e-5, strict=True):
    """`fn` on compressed arguments, strictly, equals `fn` on dense ones; returns what was hit."""
    with watch() as hits:
        out = jax.jit(compressed(fn, strict=strict))(*args)
    expected = fn(*dense(args))
    assert out.dtype == expected.dtype
    scale = max(1.0, float(jnp.max(jnp.abs(expected))))
    np.testing.assert_allclose(np.float32(out), np.float32(expected), rtol=tolerance, atol=tolerance * scale)
    return hits


def values(shape, seed=1, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("fn", [lambda w: jnp.ones((2, 6)) @ w, lambda w: w @ jnp.ones(8), jnp.asarray, np.asarray])
def test_a_leaf_outside_compressed_says_what_to_call(fn):
    with pytest.raises(TypeError, match=r"a Quantized weight of shape \(6, 8\) .* compressed\(model.apply\)"):
        fn(quantized((6, 8)))


@pytest.fixture(params=[1 << 18, 64], ids=["one tile", "many tiles"])
def tile(request, monkeypatch):
    monkeypatch.setattr(_sparse_rules, "TILE", request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: x @ w,
        lambda x, w: jnp.dot(x[0], w),
        lambda x, w: jnp.einsum("bi,io->ob", x, w),
        lambda x, w: jnp.einsum("io,bi->ob", w, x),
        lambda x, w: w.T @ x.T,
        lambda x, w: (x @ w) @ w.T,  # a tied embedding, read both ways
        lambda x, w: x @ w.reshape(12, 2, 5)[:, 0] if False else jnp.tensordot(x, w.reshape(12, 2, 5), 1),
        lambda x, w: jnp.tensordot(x.reshape(-1, 3, 4), w.reshape(3, 4, 10), 2),
        lambda x, w: jnp.einsum("bhi,hio->bho", x.reshape(-1, 3, 4), w.reshape(3, 4, 10)),
        lambda x, w: x @ w[None].squeeze(0) if False else x @ lax.squeeze(w.reshape(1, 12, 10), [0]),
    ],
    ids=[
        "matmul",
        "vector",
        "einsum",
        "weight first",
        "transposed",
        "tied",
        "split out",
        "two contracted",
        "batched",
        "squeeze",
    ],
)
def test_products(kind, fn, tile):
    hits = check(fn, values((6, 12)), KINDS[kind]((12, 10)))
    assert any(primitive == "dot_general" and how == "rule" for _, primitive, how in hits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [4, 5, 12, 20])  # 5 doesn't divide the axis, 20 is longer than it
def test_groups(bits, size):
    w = quantized((12, 10), group=(-2, size), bits=bits, asymmetric=True)
    assert check(lambda x, w: x @ w, values((6, 12)), w)[("Quantized", "dot_general", "rule")] == 1
    check(lambda x, w: jnp.tensordot(x.reshape(-1, 3, 4), w.reshape(3, 4, 10), 2), values((6, 12)), w, strict=False)


def test_scale_along_the_contracted_axis_only():
    check(lambda x, w: x @ w, values((6, 12)), quantized((12, 10), axes=(-2,)))


@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_any_dot_general(data):
    """Any contracting and batch dimensions, on any rank, either side."""
    n_batch, n_contract = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    n_x, n_w = data.draw(st.integers(0, 2)), data.draw(st.integers(0 if n_batch + n_contract else 1, 2))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=8, max_size=8))
    batch, contract = sizes[:n_batch], sizes[2 : 2 + n_contract]
    x_labels = (
        [("b", i) for i in range(n_batch)] + [("c", i) for i in range(n_contract)] + [("x", i) for i in range(n_x)]
    )
    w_labels = (
        [("b", i) for i in range(n_batch)] + [("c", i) for i in range(n_contract)] + [("w", i) for i in range(n_w)]
    )
    x_labels, w_labels = data.draw(st.permutations(x_labels)), data.draw(st.permutations(w_labels))
    size = {("b", i): n for i, n in enumerate(batch)} | {("c", i): n for i, n in enumerate(contract)}
    size |= {("x", i): sizes[4 + i] for i in range(n_x)} | {("w", i): sizes[6 + i] for i in range(n_w)}
    x = values([size[label] for label in x_labels])
    axes = tuple(data.draw(st.sets(st.sampled_from(range(-len(w_labels), 0)))))
    kind = data.draw(st.sampled_from(["int8", "int4", "sparse", "low rank"]))
    shape = [size[label] for label in w_labels]
    if kind == "low rank" and 0 < len(axes) < len(shape):
        w = low_rank(shape, rows=tuple(sorted(axis + len(shape) for axis in axes)))
    else:
        w = sparse(shape) if kind == "sparse" else quantized(shape, axes=axes, bits=4 if kind == "int4" else 8)

    def numbers(first, second):
        def where(kind, n, labels):
            return tuple(labels.index((kind, i)) for i in range(n))

        return tuple((where(kind, n, first), where(kind, n, second)) for kind, n in (("c", n_contract), ("b", n_batch)))

    check(lambda x, w: lax.dot_general(x, w, numbers(x_labels, w_labels)), x, w, strict=False)
    check(lambda x, w: lax.dot_general(w, x, numbers(w_labels, x_labels)), x, w, strict=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["plain", "strided", "grouped", "depthwise", "transposed", "flipped", "NCHW"])
def test_convolutions(kind, case, tile):
    x, shape, kwargs = values((2, 8, 8, 4)), (3, 3, 4, 6), {"window_strides": (1, 1), "padding": "SAME"}
    layout = ("NHWC", "HWIO", "NHWC")
    if case == "strided":
        kwargs |= {"window_strides": (2, 2), "rhs_dilation": (2, 2)}
    if case in ("grouped", "depthwise"):
        groups = 2 if case == "grouped" else 4
        shape, kwargs = (3, 3, 4 // groups, 8), kwargs | {"feature_group_count": groups}
    if case == "NCHW":
        x, layout = jnp.transpose(x, (0, 3, 1, 2)), ("NCHW", "HWIO", "NCHW")
    w = KINDS[kind](shape)

    def fn(x, w):
        if case == "transposed":
            return lax.conv_transpose(x, w, (2, 2), "SAME")
        if case == "flipped":
            return lax.conv_transpose(x, w.transpose(0, 1, 3, 2), (2, 2), "SAME", transpose_kernel=True)
        return lax.conv_general_dilated(x, w, dimension_numbers=layout, **kwargs)

    known_dense = (isinstance(w, Sparse) and case in ("grouped", "depthwise", "flipped")) or (
        isinstance(w, LowRank) and case in ("grouped", "depthwise")
    )
    hits = check(fn, x, w, strict=not known_dense)
    if not known_dense:
        assert hits[(type(w).__name__, "conv_general_dilated", "rule")] == 1


@pytest.mark.parametrize("axes", [(-1,), (-2,)])
@pytest.mark.parametrize("wanted", [None, "float32"])
def test_inputs_of_8_bit_floats(axes, wanted, rng):
    """JAX has no promotion of them beside a scale in float32; what comes out is of the dtype that was asked for."""
    w, x = quantized((8, 6), axes=axes, dtype="float8_e4m3fn"), jnp.asarray(rng.normal(size=(3, 8)), "float8_e4m3fn")
    weight = np.asarray(dataclasses.replace(w, compute_dtype="float32").materialise(), np.float64)
    for fn in (lambda x, w: jnp.matmul(x, w, preferred_element_type=wanted), lambda x, w: (w.T @ x.T).T):
        out = compressed(fn, strict=True)(x, w)
        assert out.dtype == fn(x, dense(w)).dtype
        relative = 1e-6 if out.dtype == jnp.float32 else 0.07
        np.testing.assert_allclose(np.float64(out), np.float64(x) @ weight, rtol=relative, atol=10 * relative)


@pytest.mark.parametrize("axes", [(), (-1,), (-2,), (-2, -1)])
@pytest.mark.parametrize("bits", [8, 4])
def test_lookups(axes, bits):
    table, indices = quantized((20, 9), axes=axes, bits=bits, asymmetric=True), jnp.asarray([[3, 19], [0, 3], [7, 7]])
    hits = check(lambda t, i: jnp.take(t, i, axis=0), table, indices)
    assert hits[("Quantized", "gather", "rule")] == 1
    check(lambda t, i: t[i], table, indices)


def test_lookups_in_groups_and_in_sparse_tables():
    indices = jnp.asarray([[3, 19], [0, 3], [7, 7]])
    check(lambda t, i: jnp.take(t, i, axis=0), quantized((20, 9), axes=(-2,), group=(-1, 4)), indices)
    assert check(lambda t, i: jnp.take(t, i, axis=0), sparse((20, 9)), indices)[("Sparse", "gather", "rule")] == 1


@pytest.mark.parametrize(
    "table",
    [
        quantized((6, 9)),
        quantized((6, 9), axes=(-2,), asymmetric=True),
        sparse((6, 9)),
        low_rank((6, 9)),
        quantize.KMeans(4).convert(jnp.arange(54.0).reshape(6, 9)),
    ],
    ids=["a scale an output", "a row", "sparse", "low rank", "codebook"],
)
def test_lookups_out_of_range_are_filled_as_those_of_the_dense_table(table):
    at = jnp.asarray([5, 6, -7, 0])
    for fn in (lambda t: jnp.take(t, at, axis=0), lambda t: t.at[at].get(mode="fill", fill_value=3.0)):
        np.testing.assert_allclose(compressed(fn)(table), fn(dense(table)), rtol=1e-5, atol=1e-6)


def test_a_lookup_does_not_build_the_table():
    table, indices = quantized((4096, 256), axes=(-2,)), jnp.arange(3)
    stats = jax.jit(compressed(lambda t, i: jnp.take(t, i, axis=0))).lower(table, indices).compile().memory_analysis()
    assert stats.temp_size_in_bytes < 4096 * 256 // 10


def test_a_sparse_product_does_not_build_the_weight():
    w, x = sparse((1024, 4096), keep=0.1), values((2, 1024))

    def loss(x, w):
        return jnp.sum(compressed(lambda x, w: x @ w)(x, w) ** 2)

    for fn in (compressed(lambda x, w: x @ w), jax.grad(loss)):
        stats = jax.jit(fn).lower(x, w).compile().memory_analysis()
        assert stats.temp_size_in_bytes < 4 * 1024 * 4096 * 0.6  # the dense weight alone would be 16.8 MB


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_of_input(kind):
    """An empty batch gives an empty result."""
    w, kernel = KINDS[kind]((12, 10)), KINDS[kind]((3, 3, 4, 10))
    numbers = ("NHWC", "HWIO", "NHWC")
    for fn, x, shape in [
        (lambda w, x: x @ w, jnp.ones((0, 12)), (0, 10)),
        (lambda w, x: x @ w.T, jnp.ones((0, 10)), (0, 12)),
        (lambda w, x: jnp.take(w, x, axis=0), jnp.ones(0, int), (0, 10)),
    ]:
        assert jax.eval_shape(compressed(fn), w, x).shape == shape

    def convolve(w, x):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    assert jax.eval_shape(compressed(convolve), kernel, jnp.ones((0, 5, 5, 4))).shape == (0, 5, 5, 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [False, True])
def test_a_narrower_input_gives_what_the_two_dtypes_give(kind, first):
    """`lax.dot_general` itself, which takes operands of two dtypes."""
    numbers = ((0,), (1,)) if first else ((1,), (0,))

    def fn(x, w):
        return lax.dot_general(*((w, x) if first else (x, w)), (numbers, ((), ())))

    check(fn, values((3, 12), dtype="bfloat16"), KINDS[kind]((12, 10)))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_compute(kind):
    """A float32 weight cast to bfloat16 stays compressed, and multiplies as closely as bfloat16 allows."""
    hits = check(
        lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
        values((6, 12)),
        KINDS[kind]((12, 10)),
        tolerance=0.02,
    )
    assert not any(how == "dense" for *_, how in hits)


@pytest.mark.parametrize(
    ("kind", "trained"), [("int8", "scale"), ("int4", "scale"), ("sparse", "values"), ("low rank", "left")]
)
def test_gradients(kind, trained):
    x, w = values((6, 12)), KINDS[kind]((12, 10))

    def fast(x, part):
        now = dataclasses.replace(w, **{trained: part})
        return jnp.sum(jnp.tanh(compressed(lambda x, w: x @ w, strict=True)(x, now)) ** 2)

    def slow(x, part):
        return jnp.sum(jnp.tanh(x @ dataclasses.replace(w, **{trained: part}).materialise()) ** 2)

    got = jax.jit(jax.grad(fast, argnums=(0, 1)))(x, getattr(w, trained))
    expected = jax.grad(slow, argnums=(0, 1))(x, getattr(w, trained))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, expected)


def test_strict_names_the_primitive_and_the_shape():
    w = quantized((12, 10))
    with pytest.raises(MadeDenseError, match=r"Quantized weight of shape \(12, 10\).*`tanh`"):
        compressed(jnp.tanh, strict=True)(w)
    np.testing.assert_array_equal(compressed(jnp.tanh)(w), jnp.tanh(w.materialise()))


def test_strict_is_not_fooled_by_what_was_traced_before():
    helper = jax.jit(lambda x, w: x @ jnp.tanh(w))
    x, w = values((6, 12)), quantized((12, 10))
    compressed(helper)(x, w)
    with pytest.raises(MadeDenseError):
        compressed(helper, strict=True)(x, w)


def test_what_is_handed_through_stays_compressed():
    w = quantized((12, 10))
    out, y = compressed(lambda w, x: (w, x @ w), strict=True)(w, values((6, 12)))
    assert isinstance(out, Quantized) and not out.strict
    assert y.shape == (6, 10)
