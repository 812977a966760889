"""Losses on outputs: limits, identities between them, and what each is made to see or to ignore."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import distill

LABELS = np.arange(6) % 10


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def logits(rng):
    return tuple((rng.normal(size=(2, 6, 10)) * 3).astype("float32"))


def gradient(loss, student):
    return np.asarray(jax.jit(jax.grad(lambda z: jnp.sum(loss(z))))(student))


def test_soft_targets_tend_to_half_the_centred_logit_matching(logits):
    s, t = logits
    limit = distill.logit_matching_loss(s, t, centred=True) / 2
    gaps = [np.max(np.abs(distill.soft_target_loss(s, t, temperature=T) - limit)) for T in (10.0, 30.0, 100.0)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.05 * np.max(limit)


def test_centred_matching_ignores_a_shift(logits):
    s, t = logits
    shifted = distill.logit_matching_loss(s + 5, t, centred=True)
    np.testing.assert_allclose(shifted, distill.logit_matching_loss(s, t, centred=True), rtol=1e-4)
    assert np.all(distill.logit_matching_loss(s + 50, t) > shifted)


def test_decoupled_recombines_to_soft_targets(logits):
    """KL = TCKD + (1 - p_target) NCKD: equation 6 of the paper, with the teacher's own doubt as beta."""
    s, t = logits
    doubt = 1 - softmax(t / 4)[np.arange(6), LABELS]
    whole = distill.decoupled_loss(s, t, LABELS, alpha=1.0, beta=jnp.asarray(doubt), temperature=4.0)
    np.testing.assert_allclose(whole, distill.soft_target_loss(s, t, temperature=4.0), rtol=1e-4)


def test_standardized_ignores_scale_and_shift(logits):
    s, t = logits
    want = distill.standardized_soft_target_loss(s, t)
    np.testing.assert_allclose(distill.standardized_soft_target_loss(7 * s - 3, t / 5 + 2), want, rtol=1e-3)


def test_dist_ignores_an_affine_student(logits):
    """Correlation of probabilities: mixing the teacher's own with the uniform leaves nothing to learn."""
    p = softmax(logits[1])
    mixed = np.log(0.5 * p + 0.05)
    assert abs(distill.dist_loss(mixed, logits[1])) < 1e-4
    assert distill.soft_target_loss(mixed, logits[1]).mean() > 0.1


@pytest.mark.parametrize("beta", [1e-4, 1 - 1e-4])
def test_jensen_shannon_over_beta_tends_to_its_ends(logits, beta):
    s, t = logits
    end = distill.soft_target_loss(s, t) if beta < 0.5 else distill.reverse_kl_loss(s, t)
    near = distill.jensen_shannon_loss(s, t, beta) / (beta * (1 - beta))
    np.testing.assert_allclose(near, end, rtol=0.05)
    np.testing.assert_allclose(distill.jensen_shannon_loss(s, t, round(beta)), end, rtol=1e-6)


def test_reverse_kl_seeks_a_mode_and_forward_kl_covers():
    """A student of one peak against two: the forward KL wants it between them, the reverse on one of them."""
    x = jnp.linspace(-4, 4, 81)
    teacher = jnp.logaddexp(-((x - 2) ** 2) * 4, -((x + 2) ** 2) * 4)
    centres = jnp.linspace(-3, 3, 61)
    students = -((x[None] - centres[:, None]) ** 2) * 2
    teachers = jnp.broadcast_to(teacher, students.shape)
    forward = centres[jnp.argmin(distill.soft_target_loss(students, teachers))]
    reverse = centres[jnp.argmin(distill.reverse_kl_loss(students, teachers))]
    assert abs(forward) < 0.2 and abs(abs(reverse) - 2) < 0.3


def test_multi_level_is_the_sum_of_its_parts(logits):
    s, t = logits
    parts = sum(
        jnp.mean(distill.soft_target_loss(s, t, temperature=T))
        + distill.batch_correlation_loss(s, t, temperature=T)
        + distill.class_correlation_loss(s, t, temperature=T)
        for T in (2.0, 4.0)
    )
    np.testing.assert_allclose(distill.multi_level_loss(s, t, (2.0, 4.0)), parts, rtol=1e-6)


@pytest.mark.parametrize("tail", [True, False])
def test_top_k_of_all_classes_is_the_whole_loss(logits, tail):
    got = distill.top_k_loss(*logits, 10, tail=tail, temperature=2.0)
    np.testing.assert_allclose(got, distill.soft_target_loss(*logits, temperature=2.0), rtol=1e-4)


def test_top_k_with_a_tail_never_exceeds_the_whole_divergence(logits):
    """Merging classes cannot raise a divergence; and with more classes apart it only rises."""
    values = [np.asarray(distill.top_k_loss(*logits, k)) for k in (1, 0.25, 0.5, 9)]
    for fewer, more in zip(values, [*values[1:], np.asarray(distill.soft_target_loss(*logits))], strict=True):
        assert np.all(fewer <= more + 1e-5)


def test_top_k_share_of_the_classes(logits):
    np.testing.assert_array_equal(distill.top_k_loss(*logits, 0.5), distill.top_k_loss(*logits, 5))
    np.testing.assert_array_equal(distill.top_k_loss(*logits, 0.01), distill.top_k_loss(*logits, 1))


@pytest.mark.parametrize("tail", [True, False])
def test_stored_top_k_is_the_live_one(logits, tail):
    targets = distill.top_k_targets(logits[1], 3, temperature=2.0)
    got = distill.top_k_target_loss(logits[0], targets, temperature=2.0, tail=tail)
    np.testing.assert_allclose(got, distill.top_k_loss(*logits, 3, tail=tail, temperature=2.0), rtol=1e-5)


def test_tail_bucket_has_the_smaller_gradient_error(rng):
    """On a flat teacher over many classes, against the full loss's gradient (performance.md section 2 asks <= 0.7x)."""
    s, t = (rng.normal(size=(2, 8, 2000)) * 1.5).astype("float32")
    full = gradient(lambda z: distill.soft_target_loss(z, t), s)
    targets = distill.top_k_targets(t, 64)
    error = [
        np.linalg.norm(gradient(lambda z, tail=tail: distill.top_k_target_loss(z, targets, tail=tail), s) - full)
        for tail in (True, False)
    ]
    assert error[0] < 0.7 * error[1]


@pytest.mark.parametrize("proposal", [None, 3.0])
def test_sampled_targets_are_right_on_average(logits, proposal):
    s, t = logits

    @jax.jit
    def of_key(key):
        targets = distill.sampled_targets(key, t, 8, temperature=2.0, proposal_temperature=proposal)
        return jax.value_and_grad(lambda z: jnp.sum(distill.sampled_target_loss(z, targets, temperature=2.0)))(s)

    values, gradients = jax.lax.map(of_key, jax.random.split(jax.random.key(0), 2000), batch_size=200)
    full, full_gradient = jax.value_and_grad(lambda z: jnp.sum(distill.soft_cross_entropy_loss(z, t, temperature=2.0)))(
        s
    )
    assert abs(values.mean() - full) < 4 * values.std() / 2000**0.5
    limit = 5 * gradients.std(0) / 2000**0.5 + 1e-4
    assert np.all(np.abs(gradients.mean(0) - full_gradient) < limit)


def test_smoothing_conventions():
    even = distill.smooth_labels(np.array([1]), 4, 0.2)
    np.testing.assert_allclose(even, [[0.05, 0.85, 0.05, 0.05]], rtol=1e-6)
    wrong = distill.smooth_labels(np.array([1]), 4, 0.2, onto_wrong_only=True)
    np.testing.assert_allclose(wrong, [[0.2 / 3, 0.8, 0.2 / 3, 0.2 / 3]], rtol=1e-6)


def test_label_smoothing_is_the_soft_loss_on_smooth_labels(logits):
    target = distill.smooth_labels(LABELS, 10, 0.3)
    entropy = -np.sum(target * np.log(target), -1)
    want = distill.soft_label_loss(logits[0], target) + entropy
    np.testing.assert_allclose(distill.label_smoothing_loss(logits[0], LABELS, 0.3), want, rtol=1e-5)


def test_virtual_teacher_is_right_and_even_elsewhere():
    p = np.asarray(distill.virtual_teacher(np.array([2]), 5, 0.9, temperature=2.0))[0]
    assert p.argmax() == 2 and np.ptp(np.delete(p, 2)) < 1e-7
    np.testing.assert_allclose(p[2] / p[0], np.exp((0.9 - 0.025) / 2), rtol=1e-5)


def test_reweighting_teacher_keeps_the_confidence_alone(logits):
    p = distill.temperature_softmax(logits[1], 2.0)
    synthetic = np.asarray(distill.reweighting_teacher(p, LABELS))
    rows = np.arange(6)
    np.testing.assert_allclose(synthetic[rows, LABELS], p[rows, LABELS], rtol=1e-6)
    np.testing.assert_allclose(synthetic.sum(-1), 1, rtol=1e-6)
    others = synthetic[~np.eye(10, dtype=bool)[LABELS]].reshape(6, 9)
    assert np.all(np.ptp(others, axis=1) < 1e-7)


def test_class_similarity_teacher_keeps_the_likeness_alone(rng):
    weights = rng.normal(size=(16, 5)).astype("float32")
    weights[:, 3] = 2 * weights[:, 1] + 0.1 * weights[:, 0]  # classes 1 and 3 alike
    p = np.asarray(distill.class_similarity_teacher(weights, np.array([1, 1, 0]), sharpness=4.0))
    np.testing.assert_array_equal(p[0], p[1])
    assert np.argsort(p[0])[-2:].tolist() == [3, 1] and not np.allclose(p[0], p[2])
    set_confidence = np.asarray(distill.class_similarity_teacher(weights, np.array([1]), sharpness=4.0, confidence=0.6))
    np.testing.assert_allclose(set_confidence[0, 1], 0.6, rtol=1e-6)
    np.testing.assert_allclose(set_confidence[0, [0, 2]] / set_confidence[0, 3], p[0, [0, 2]] / p[0, 3], rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_rescaling_factor_is_the_ratio_of_gradients(logits, temperature):
    s, t = logits
    factor = distill.gradient_rescaling_factor(s, t, LABELS, alpha=0.7, temperature=temperature)
    with_teacher = gradient(lambda z: distill.distillation_loss(z, t, LABELS, alpha=0.7, temperature=temperature), s)
    alone = gradient(lambda z: distill.hard_label_loss(z, LABELS), s)
    rows = np.arange(6)
    np.testing.assert_allclose(factor, with_teacher[rows, LABELS] / alone[rows, LABELS], rtol=2e-3)


def test_rescaling_factor_of_a_certain_student_is_finite():
    z = np.array([[1e30, 0.0]], "float32")
    np.testing.assert_allclose(distill.gradient_rescaling_factor(z, z, np.array([0]), alpha=0.9), 0.1, rtol=1e-5)


def test_soft_label_loss_is_the_soft_target_loss_on_the_same_targets(logits):
    s, t = logits
    got = distill.soft_label_loss(s, distill.temperature_softmax(t, 3.0), temperature=3.0)
    np.testing.assert_allclose(got, distill.soft_target_loss(s, t, temperature=3.0), rtol=1e-4)
    one_hot = jax.nn.one_hot(LABELS, 10)
    np.testing.assert_allclose(distill.soft_label_loss(s, one_hot), distill.hard_label_loss(s, LABELS), rtol=1e-5)


def test_ensembles_against_numpy(rng):
    z = (rng.normal(size=(3, 4, 5)) * 2).astype("float32")
    weights = np.array([1.0, 2.0, 1.0])
    shares = weights / 4
    arithmetic = np.tensordot(shares, softmax(z / 2.0), 1)
    geometric = np.exp(np.tensordot(shares, np.log(softmax(z / 2.0)), 1))
    geometric /= geometric.sum(-1, keepdims=True)
    for mean, want in (("probabilities", arithmetic), ("logits", geometric), ("log_probabilities", geometric)):
        got = distill.ensemble_targets(z, temperature=2.0, mean=mean, weights=weights)
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=mean)
    moved = distill.ensemble_targets(np.moveaxis(z, -1, -2), temperature=2.0, weights=weights, axis=-2)
    np.testing.assert_allclose(np.moveaxis(moved, -2, -1), arithmetic, rtol=1e-5)


def test_several_teachers_have_the_gradient_of_their_mean(logits, rng):
    s, teachers = logits[0], (rng.normal(size=(3, 6, 10)) * 3).astype("float32")
    weights = np.array([0.5, 0.2, 0.3])
    mean = distill.ensemble_targets(teachers, temperature=4.0, weights=weights)
    together = gradient(lambda z: distill.several_teachers_loss(z, teachers, temperature=4.0, weights=weights), s)
    np.testing.assert_allclose(
        together, gradient(lambda z: distill.soft_label_loss(z, mean, temperature=4.0), s), atol=2e-5
    )
    assert np.all(
        distill.several_teachers_loss(s, teachers, temperature=4.0, weights=weights)
        >= distill.soft_label_loss(s, mean, temperature=4.0) - 1e-4
    )


def test_mutual_learning_is_hard_labels_and_peers(rng):
    z = (rng.normal(size=(3, 4, 5)) * 2).astype("float32")
    labels = np.array([0, 1, 2, 3])
    losses = distill.mutual_learning_loss(list(z), labels, weight=0.5)
    peers = (distill.soft_target_loss(z[0], z[1]) + distill.soft_target_loss(z[0], z[2])) / 2
    np.testing.assert_allclose(losses[0], distill.hard_label_loss(z[0], labels) + 0.5 * peers, rtol=1e-5)
    np.testing.assert_allclose(
        distill.mutual_learning_loss(list(z), labels, weight=0.5, learner=2), losses[2], rtol=1e-6
    )

    def of_first(first):
        return jnp.sum(distill.mutual_learning_loss([first, *z[1:]], labels, weight=0.5))

    def of_first_alone(first):
        return jnp.sum(distill.mutual_learning_loss([first, *z[1:]], labels, weight=0.5, learner=0))

    np.testing.assert_allclose(jax.grad(of_first)(z[0]), jax.grad(of_first_alone)(z[0]), atol=1e-6)


def test_bad_input():
    z, labels = np.zeros((2, 3), "float32"), np.zeros(2, int)
    one = np.zeros((2, 1), "float32")
    wrong = [
        (lambda: distill.decoupled_loss(one, one, labels), "at least 2 classes"),
        (lambda: distill.standardized_soft_target_loss(one, one), "at least 2 classes"),
        (lambda: distill.jensen_shannon_loss(z, z, 1.5), "beta must lie in"),
        (lambda: distill.dist_loss(z[0], z[0]), r"\[batch, classes\]"),
        (lambda: distill.multi_level_loss(z, z, []), "at least one temperature"),
        (lambda: distill.top_k_loss(z, z, 4), "whole number from 1 to 3"),
        (lambda: distill.top_k_loss(z, z, 0), "whole number from 1 to 3"),
        (lambda: distill.top_k_loss(z, z, 1.5), "whole number from 1 to 3"),
        (lambda: distill.top_k_loss(z, z, 1, support="both"), "'teacher' or 'student'"),
        (lambda: distill.smooth_labels(labels, 1), "at least 2"),
        (lambda: distill.smooth_labels(labels, 3, 2.0), "epsilon must lie in"),
        (lambda: distill.teacher_free_loss(z, labels, student_temperature=0.0), "student_temperature"),
        (lambda: distill.class_similarity_teacher(z[0], labels), r"\[features, classes\]"),
        (lambda: distill.sampled_targets(jax.random.key(0), z, 0), "samples must be at least 1"),
        (lambda: distill.top_k_target_loss(z, distill.top_k_targets(z[:1], 1)), "targets must be"),
        (lambda: distill.sampled_target_loss(z, distill.sampled_targets(jax.random.key(0), z[:1], 2)), "targets must"),
        (lambda: distill.ensemble_targets(z, mean="median"), "mean must be"),
        (lambda: distill.ensemble_targets(z[0]), "teachers, ..., classes"),
        (lambda: distill.ensemble_targets(z[None], axis=1), "counted from the end"),
        (lambda: distill.ensemble_targets(z[None], weights=[1.0, 1.0]), "one a teacher"),
        (lambda: distill.mutual_learning_loss([z], labels), "two networks"),
        (lambda: distill.mutual_learning_loss([z, z], labels, learner=2), "learner must be"),
        (lambda: distill.soft_label_loss(z, z[:, :2]), "one shape"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
