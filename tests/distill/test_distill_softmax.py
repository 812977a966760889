"""Soft targets against NumPy float64, closed forms, and properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcompress import distill

SOFT = [distill.soft_target_loss, distill.soft_cross_entropy_loss]


def np_softmax(z, temperature=1.0):
    z = np.asarray(z, np.float64) / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def logits(rng):
    return rng.normal(size=(6, 10)).astype("float32") * 3, rng.normal(size=(6, 10)).astype("float32") * 3


def test_temperature_softmax_is_the_equation(logits):
    for temperature in (0.5, 1.0, 20.0):
        got = distill.temperature_softmax(logits[0], temperature)
        np.testing.assert_allclose(got, np_softmax(logits[0], temperature), rtol=2e-5)
        np.testing.assert_allclose(np.exp(distill.temperature_log_softmax(logits[0], temperature)), got, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_values_are_numpys(logits, temperature):
    p_s, p_t = (np_softmax(z, temperature) for z in logits)
    kl = temperature**2 * np.sum(p_t * (np.log(p_t) - np.log(p_s)), -1)
    entropy = -(temperature**2) * np.sum(p_t * np.log(p_t), -1)
    np.testing.assert_allclose(distill.soft_target_loss(*logits, temperature=temperature), kl, rtol=5e-5)
    np.testing.assert_allclose(
        distill.soft_cross_entropy_loss(*logits, temperature=temperature), kl + entropy, rtol=5e-5
    )


@pytest.mark.parametrize("loss", SOFT)
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_gradient_is_the_closed_form(logits, loss, temperature):
    """T (p_student - p_teacher), equation 2 of the paper with its T**2."""
    got = jax.grad(lambda s: loss(s, logits[1], temperature=temperature).sum())(logits[0])
    want = temperature * (np_softmax(logits[0], temperature) - np_softmax(logits[1], temperature))
    np.testing.assert_allclose(got, want, atol=2e-5 * temperature)


def test_gradient_tends_to_centred_logit_matching_at_high_temperature(logits):
    """Equation 4 of the paper: dC/dz_i = (z_i - v_i) / N for zero-mean logits, here times T**2 / T**2."""
    s, t = (z - z.mean(-1, keepdims=True) for z in logits)
    got = jax.grad(lambda z: distill.soft_target_loss(z, t, temperature=1000.0).sum())(s)
    np.testing.assert_allclose(got, (s - t) / 10, atol=0.02)


@pytest.mark.parametrize("loss", SOFT)
def test_no_gradient_reaches_the_teacher(logits, loss):
    assert not np.any(jax.grad(lambda t: loss(logits[0], t, temperature=2.0).sum())(logits[1]))


def test_total_weighs_its_two_halves(logits):
    labels = np.arange(6) % 10
    hard = -np.log(np_softmax(logits[0])[np.arange(6), labels])
    soft = np.asarray(distill.soft_target_loss(*logits, temperature=3.0))
    got = distill.distillation_loss(*logits, labels, alpha=0.7, temperature=3.0)
    np.testing.assert_allclose(got, 0.7 * soft + 0.3 * hard, rtol=1e-5)
    np.testing.assert_allclose(distill.hard_label_loss(logits[0], labels), hard, rtol=1e-5)


def test_two_weights_have_the_gradient_of_one(logits):
    labels = np.arange(6) % 10
    one = jax.grad(lambda z: distill.distillation_loss(z, logits[1], labels, alpha=0.7, temperature=3.0).sum())
    two = jax.grad(
        lambda z: distill.weighted_distillation_loss(
            z, logits[1], labels, hard_weight=0.3, soft_weight=0.7, temperature=3.0
        ).sum()
    )
    np.testing.assert_allclose(one(logits[0]), two(logits[0]), atol=1e-5)


def test_alpha_may_be_scheduled_under_jit(logits):
    labels = np.arange(6) % 10
    loss = jax.jit(lambda a, t: distill.distillation_loss(*logits, labels, alpha=a, temperature=t))
    np.testing.assert_allclose(
        loss(0.2, 2.0), distill.distillation_loss(*logits, labels, alpha=0.2, temperature=2.0), rtol=1e-5
    )


def test_class_axis(logits):
    channels_first = [np.moveaxis(z.reshape(2, 3, 10), -1, 1) for z in logits]
    got = distill.soft_target_loss(*channels_first, temperature=2.0, axis=1)
    np.testing.assert_allclose(got, distill.soft_target_loss(*logits, temperature=2.0).reshape(2, 3), rtol=1e-6)
    labels = np.arange(6).reshape(2, 3)
    got = distill.distillation_loss(*channels_first, labels, axis=1)
    np.testing.assert_allclose(got, distill.distillation_loss(*logits, labels.reshape(-1)).reshape(2, 3), rtol=1e-6)


def test_padding_gives_nothing_whatever_it_holds(logits):
    student, teacher = logits
    where, labels = np.array([True, True, False, True, True, False]), np.array([1, 2, -100, 3, 4, -100])
    padded = student.copy()
    padded[2], padded[5] = np.nan, np.inf

    def mean(z):
        return distill.masked_mean(distill.distillation_loss(z, teacher, labels, where=where), where)

    value, gradient = jax.value_and_grad(mean)(padded)
    kept = distill.distillation_loss(student[where], teacher[where], labels[where])
    np.testing.assert_allclose(value, kept.mean(), rtol=1e-6)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[~where]) and np.all(np.any(gradient[where], -1))


def test_masked_mean_of_nothing_is_zero():
    assert distill.masked_mean(jnp.ones(3), np.zeros(3, bool)) == 0
    assert distill.masked_mean(jnp.arange(4.0)) == 1.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(logits, dtype):
    low = [jnp.asarray(z, dtype) for z in logits]
    got = distill.soft_target_loss(*low, temperature=4.0)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, distill.soft_target_loss(*[z.astype("float32") for z in low], temperature=4.0))
    assert jax.grad(lambda z: distill.soft_target_loss(z, low[1]).sum())(low[0]).dtype == dtype


def test_a_class_excluded_on_both_sides_by_minus_infinity_adds_nothing(logits):
    cut = [np.concatenate([z, np.full((6, 1), -np.inf, "float32")], -1) for z in logits]
    np.testing.assert_allclose(
        distill.soft_target_loss(*cut, temperature=2.0), distill.soft_target_loss(*logits, temperature=2.0), rtol=1e-6
    )
    gradient = jax.grad(lambda z: distill.soft_target_loss(z, cut[1], temperature=2.0).sum())(cut[0])
    assert np.all(np.isfinite(gradient))


EXTREMES = st.sampled_from([0.0, 1.0, -1.0, 1e30, -1e30, 1e4, 3e-5]) | st.floats(
    -1.0000000150474662e30, 1.0000000150474662e30, width=32
)
PAIRS = st.sampled_from([1, 3]).flatmap(
    lambda b: st.tuples(*[hnp.arrays(np.float32, (b, 4), elements=EXTREMES) for _ in range(2)])
)


LABELLED = [distill.distillation_loss, distill.weighted_distillation_loss]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(loss, student, teacher, temperature):
    labels = (np.zeros(len(student), int),) if loss in LABELLED else ()
    return jax.value_and_grad(lambda z: loss(z, teacher, *labels, temperature=temperature).sum())(student)


@pytest.mark.parametrize("loss", SOFT + LABELLED)
@given(PAIRS, st.sampled_from([0.5, 1.0, 20.0]))
@settings(max_examples=100, deadline=None)
def test_finite_up_to_1e30(loss, pair, temperature):
    value, gradient = value_and_gradient(loss, *pair, temperature)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


soft_target_loss = jax.jit(distill.soft_target_loss)


@given(PAIRS)
@settings(max_examples=50, deadline=None)
def test_divergence_is_not_negative_and_zero_on_itself(pair):
    assert np.all(soft_target_loss(*pair, temperature=4.0) >= -1e-4)
    np.testing.assert_allclose(soft_target_loss(pair[0], pair[0], temperature=4.0), 0, atol=1e-6)


def test_bad_input():
    z = np.zeros((2, 3), "float32")
    with pytest.raises(ValueError, match="one shape"):
        distill.soft_target_loss(z, z[:1])
    with pytest.raises(ValueError, match="temperature must be above 0"):
        distill.soft_target_loss(z, z, temperature=0.0)
    with pytest.raises(TypeError, match="floating"):
        distill.soft_target_loss(z.astype(int), z)
    with pytest.raises(ValueError, match="class axis"):
        distill.soft_target_loss(np.float32(1), np.float32(1))
    with pytest.raises(ValueError, match="alpha must lie in"):
        distill.distillation_loss(z, z, np.zeros(2, int), alpha=1.5)
    with pytest.raises(TypeError, match="integer class indices"):
        distill.hard_label_loss(z, np.zeros(2, "float32"))
    with pytest.raises(ValueError, match="labels must have shape"):
        distill.hard_label_loss(z, np.zeros(3, int))
    with pytest.raises(ValueError, match="where must have"):
        distill.soft_target_loss(z, z, where=np.ones((2, 3), bool))
