import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcompress.arrays import Quantized, dense
from jaxcompress.paths import UnmatchedRuleError
from jaxcompress.quantize import Affine, KMeans, convert, fake_quantize, quantize

weights = hnp.arrays(
    np.float32,
    st.sampled_from([(1,), (7,), (1, 5), (5, 4), (3, 4, 2)]),  # few shapes, for each is compiled anew
    elements=st.one_of(
        st.floats(-10, 10, width=32), st.floats(width=32, allow_nan=False, allow_infinity=False), st.just(0.0)
    ),
)


@st.composite
def specs(draw, ndim):
    axes = tuple(draw(st.sets(st.sampled_from(range(-ndim, 0)))))
    group = draw(st.none() | st.tuples(st.sampled_from(range(-ndim, 0)), st.integers(1, 5)))
    return Affine(draw(st.integers(2, 8)), axes=axes, group=group, symmetric=draw(st.booleans()))


@settings(deadline=None, max_examples=5)
@given(data=st.data())
def test_round_trip_is_within_half_a_step(data):
    """Any shape, any grid, any finite weight: the error is at most half a step of its block, and all is finite."""
    w = data.draw(weights)
    spec = data.draw(specs(w.ndim))

    @jax.jit
    def converted(w):
        q = quantize(w, spec)
        return q.codes(), dense(q), q.spread(q.scale)

    codes, back, scale = converted(w)
    back, scale = np.float64(back), np.broadcast_to(np.float64(scale), w.shape)
    assert np.all(np.isfinite(back)) and np.all(scale > 0) and np.all(np.isfinite(scale))
    flushed = np.where(np.abs(w) < np.finfo(np.float32).tiny, 0, np.float64(w))  # subnormal weights are zero to XLA
    np.testing.assert_array_less(np.abs(back - flushed), 0.5 * scale * (1 + 1e-5) + 1e-6 * np.abs(flushed) + 1e-37)
    low, high = spec.limits
    assert int(np.min(codes)) >= low and int(np.max(codes)) <= high
    assert np.all(back[w == 0] == 0)


@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_fake_equals_converted_to_the_bit(data):
    w = data.draw(weights)
    spec = data.draw(specs(w.ndim))
    fake, converted = jax.jit(lambda w: fake_quantize(w, spec)), jax.jit(lambda w: dense(quantize(w, spec)))
    np.testing.assert_array_equal(fake(w), converted(w))


def test_codes_of_a_worked_example():
    """By hand: steps 2.54/127 = 0.02 and 1.27/127 = 0.01 a column."""
    w = jnp.asarray([[2.54, 0.33], [-1.0, -1.27], [0.009, 0.005]])
    q = quantize(w, Affine(8))
    np.testing.assert_allclose(q.scale, [[0.02, 0.01]], rtol=1e-6)
    np.testing.assert_array_equal(q.codes(), [[127, 33], [-50, -127], [0, 0]])
    assert q.zero_point is None


def test_asymmetric_worked_example():
    """[0, 5.1] in 255 steps of 0.02: zero is the lowest code."""
    q = quantize(jnp.asarray([0.0, 2.0, 5.1]), Affine(8, axes=(), symmetric=False))
    np.testing.assert_allclose(q.scale, [0.02], rtol=1e-6)
    np.testing.assert_array_equal(q.zero_point, [-128])
    np.testing.assert_array_equal(q.codes(), [-128, -28, 127])


def test_groups_have_the_scale_of_their_own_members():
    w = jnp.asarray([[1.0], [2.0], [3.0], [40.0], [7.0]])
    q = quantize(w, Affine(8, group=(0, 2)))
    np.testing.assert_allclose(q.scale * 127, [[2.0], [40.0], [7.0]], rtol=1e-6)
    assert q.group == (-2, 2)


@pytest.mark.parametrize(("bits", "stored"), [(2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_storage(bits, stored):
    q = quantize(jnp.linspace(-1, 1, 48).reshape(4, 12), Affine(bits))
    assert q.bits == stored and q.values.nbytes == 48 * stored // 8
    assert len(np.unique(q.codes())) <= 2**bits


@pytest.mark.parametrize("value", [0.0, 1e-45, 1.0, -3e38, 3e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_channels(value, symmetric):
    q = quantize(jnp.full((3, 4), value, jnp.float32), Affine(8, symmetric=symmetric))
    assert bool(jnp.all(jnp.isfinite(q.scale)))
    np.testing.assert_allclose(dense(q), 0 if abs(value) < 1e-37 else value, rtol=1e-6)


def test_a_tree_is_rounded_at_random():
    """Between the two nearest integers, each layer by itself; on average to the weight."""
    w = jnp.linspace(-1, 1, 12).reshape(3, 4)
    tree, rules = {"a": w, "b": w, "c": w}, {"a|b": Affine(3), "c": KMeans(2)}
    seen = [convert(tree, rules, key=jax.random.key(i)) for i in range(200)]
    assert any(not np.array_equal(s["a"].codes(), s["b"].codes()) for s in seen)
    values = np.stack([dense(s["a"]) for s in seen])
    step = np.asarray(seen[0]["a"].scale)
    assert np.all(np.abs(values - w) < step) and np.all(np.abs(values.mean(0) - w) < 4 * step * 0.5 / np.sqrt(200))
    np.testing.assert_array_equal(dense(seen[0]["c"]), dense(KMeans(2).convert(w)))


def test_gradient_passes_straight_through():
    w = jnp.asarray([[0.3, -0.7], [0.111, 0.2]])
    upstream = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(fake_quantize(w, Affine(2)) * upstream))(w), upstream)


def test_bfloat16_weights():
    w = jnp.linspace(-1, 1, 12, dtype=jnp.bfloat16).reshape(3, 4)
    q = quantize(w, Affine(8))
    assert q.dtype == jnp.bfloat16 and dense(q).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(dense(q)), np.float32(w), atol=0.01)


@pytest.mark.parametrize("bits", [1, 9, 0, 4.0, "8", None])
def test_unknown_bits(bits):
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
        Affine(bits)


@pytest.mark.parametrize("bits", [1, 12])
def test_unknown_activation_bits(bits):
    with pytest.raises(ValueError, match="activation_bits"):
        Affine(activation_bits=bits)


def test_refuses_groups_of_nothing():
    with pytest.raises(ValueError, match="group"):
        Affine(group=(0, 0))


def test_refuses_weights_that_no_grid_fits():
    with pytest.raises(ValueError, match="non-finite"):
        quantize(jnp.asarray([1.0, jnp.nan]))
    with pytest.raises(TypeError, match="int32"):
        quantize(jnp.asarray([1, 2]))
    with pytest.raises(ValueError, match="axis 2"):
        quantize(jnp.ones((2, 2)), Affine(axes=(2,)))


def test_convert_chooses_by_path_and_names_what_fails():
    params = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "b": {"kernel": jnp.ones((2, 3))}}
    out = convert(params, [("a/kernel", Affine(4)), ("bias", None), ("kernel", Affine(8))])
    assert (out["a"]["kernel"].bits, out["b"]["kernel"].bits) == (4, 8)
    assert out["a"]["bias"] is params["a"]["bias"]
    with pytest.raises(UnmatchedRuleError, match="a/kernel"):
        convert(params, {"kernels$": Affine()})
    params["b"]["kernel"] = jnp.full((2, 3), jnp.inf)
    with pytest.raises(ValueError, match=r"cannot quantize 'b/kernel'.*non-finite"):
        convert(params, {"kernel$": Affine()})
    with pytest.raises(TypeError, match="Quantized already"):
        convert(out, {"a/kernel": Affine()})
    for rule in (4, "int8", Affine):
        with pytest.raises(TypeError, match=r"cannot quantize 'a/bias': want a scheme"):
            convert(params, {"a/bias": rule})
    with pytest.raises(ValueError, match=r"'x': a single number is no weight"):
        convert({"x": jnp.float32(2)}, {"x": Affine(axes=())})


def test_fields_of_a_grid_are_integers():
    assert hash(Affine(axes=[0], group=[np.int64(0), 2])) == hash(Affine(axes=(0,), group=(0, 2)))
    for wrong in ({"axes": 0}, {"axes": None}, {"axes": ("x",)}, {"group": 3}, {"group": (0, 2.5)}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be a tuple of integers"):
            Affine(**wrong)
    with pytest.raises(ValueError, match="activation_bits"):
        Affine(activation_bits=8.0)
    spec = Affine(np.int64(4), activation_bits=np.int32(8))  # as files can hold them
    assert type(spec.bits) is type(spec.activation_bits) is int


def test_the_grid_does_not_depend_on_jit():
    w = jax.random.normal(jax.random.key(0), (256, 65))
    specs = [Affine(), Affine(4, group=(0, 5)), Affine(8, symmetric=False), Affine(4, group=(0, 5), symmetric=False)]
    for spec in (*specs, *(Affine(bits, axes=()) for bits in (3, 4, 5, 6, 7))):
        eager, jitted = quantize(w, spec), jax.jit(lambda w, spec=spec: quantize(w, spec))(w)
        assert isinstance(jitted, Quantized)
        jax.tree.map(np.testing.assert_array_equal, eager, jitted)
        np.testing.assert_array_equal(jax.jit(lambda w, spec=spec: fake_quantize(w, spec))(w), eager.materialise())


@pytest.mark.parametrize("spec", [Affine(2), Affine(3, symmetric=False), Affine(4, group=(0, 4), symmetric=False)])
@pytest.mark.parametrize("key", [None, 0])
def test_zeros_of_a_pruned_weight_stay(rng, spec, key):
    weight = np.where(rng.random((8, 6)) < 0.6, 0.0, 3 + rng.normal(size=(8, 6)))
    small = convert(
        {"w": jnp.asarray(weight, jnp.float32)}, {"w": spec}, key=None if key is None else jax.random.key(key)
    )
    assert not np.any(np.asarray(small["w"].materialise())[weight == 0])
