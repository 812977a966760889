"""What is handed in wrongly never passes for something else: labels, temperatures, masks, weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import distill

CLASSES = 5
Z = np.random.default_rng(0).normal(size=(4, CLASSES)).astype(np.float32)
T = Z[::-1].copy()

LABELLED = {
    "hard": distill.hard_label_loss,
    "smoothed": distill.label_smoothing_loss,
    "smoothed onto wrong": functools.partial(distill.label_smoothing_loss, onto_wrong_only=True),
    "teacher-free": distill.teacher_free_loss,
    "distillation": lambda z, y, where=None: distill.distillation_loss(z, T, y, where=where),
    "decoupled": lambda z, y, where=None: distill.decoupled_loss(z, T, y, where=where),
    "detection": lambda z, y, where=None: distill.detection_class_loss(z, T, y, where=where),
    "mutual": lambda z, y, where=None: distill.mutual_learning_loss([z, T], y, learner=0, where=where),
}
LABEL_TARGETS = {
    "smooth_labels": lambda y: distill.smooth_labels(y, CLASSES),
    "virtual_teacher": lambda y: distill.virtual_teacher(y, CLASSES),
    "reweighting_teacher": lambda y: distill.reweighting_teacher(jax.nn.softmax(Z), y),
    "class_similarity_teacher": lambda y: distill.class_similarity_teacher(Z, y),
    "class_similarity_teacher, sure": lambda y: distill.class_similarity_teacher(Z, y, confidence=0.9),
}


@pytest.mark.parametrize("name", LABELLED)
def test_a_label_that_is_no_class_gives_nan_and_not_another_class(name):
    """-1 and -100 mark padding elsewhere, 5 is one too many: without a mask they must not pass for a class."""
    loss = jax.jit(LABELLED[name])
    labels = np.array([0, -1, CLASSES, -100])
    assert np.isnan(loss(Z, labels)).tolist() == [False, True, True, True]
    masked = loss(Z, labels, where=labels == 0)
    np.testing.assert_allclose(masked, [loss(Z, np.zeros(4, int))[0], 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("name", LABEL_TARGETS)
def test_targets_of_a_label_that_is_no_class_are_nan(name):
    made = np.asarray(jax.jit(LABEL_TARGETS[name])(np.array([1, -1, CLASSES, 4])))
    assert np.isnan(made).all(-1).tolist() == [False, True, True, False]
    np.testing.assert_allclose(made[[0, 3]].sum(-1), 1, rtol=1e-6)


def test_labels_may_be_bytes():
    z = np.random.default_rng(1).normal(size=(3, 300)).astype(np.float32)
    narrow, wide = (distill.hard_label_loss(z, np.array([7, 250, 0], kind)) for kind in (np.uint8, np.int32))
    np.testing.assert_array_equal(narrow, wide)


TEMPERED = {
    "soft_target": distill.soft_target_loss,
    "jensen_shannon": distill.jensen_shannon_loss,
    "decoupled": lambda s, t, **at: distill.decoupled_loss(s, t, np.zeros(len(s), int), **at),
    "standardized": distill.standardized_soft_target_loss,
    "top_k": functools.partial(distill.top_k_loss, k=2),
    "dist": distill.dist_loss,
    "in_batch_contrastive": distill.in_batch_contrastive_loss,
}


@pytest.mark.parametrize("name", TEMPERED)
def test_a_temperature_is_one_positive_number(name):
    """Five examples and five temperatures would pass for one a class."""
    loss, square = TEMPERED[name], np.concatenate([Z, Z[:1]])
    for wrong, message in (
        (jnp.arange(1.0, 6.0), "must be one number, got shape"),
        (np.ones((5, 1)), "must be one number, got shape"),
        (np.float32(0), "must be above 0"),
        (np.int64(-1), "must be above 0"),
        (np.array(-2.0), "must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(square, square, temperature=wrong)
    one, same = (loss(square, square[::-1], temperature=t) for t in (jnp.float32(2), 2))
    np.testing.assert_allclose(one, same, rtol=1e-6)


def test_a_temperature_an_example_by_vmap():
    temperatures = np.array([1.0, 2.0, 4.0, 8.0], np.float32)
    got = jax.vmap(distill.soft_target_loss)(Z, T, temperature=temperatures)
    want = [distill.soft_target_loss(z, t, temperature=h) for z, t, h in zip(Z, T, temperatures.tolist(), strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_shares_and_weights_out_of_range():
    for call, message in (
        (lambda: distill.distillation_loss(Z, T, np.zeros(4, int), alpha=np.float32(2)), "alpha must lie in"),
        (lambda: distill.distillation_loss(Z, T, np.zeros(4, int), alpha=np.array([0, 0, 0, -1.0])), "alpha must lie"),
        (lambda: distill.ensemble_targets(np.stack([Z, T]), weights=[-1, 2]), "must not be negative, nor all 0"),
        (lambda: distill.ensemble_targets(np.stack([Z, T]), weights=[0, 0]), "must not be negative, nor all 0"),
        (lambda: distill.correlation_matrix(Z[None]), r"features must be \[batch, features\]"),
        (lambda: distill.activation_boundary_loss(Z, T, margin=-1.0), "margin must be above 0"),
        (lambda: distill.factor_transfer_loss(Z[..., None, None], T[..., None, None], order=0), "order must be 1"),
        (lambda: distill.similarity_preserving_loss(Z, T, norm_order=0), "norm_order must be above 0"),
        (lambda: distill.contrast_loss(Z, 0), "examples must be above 0"),
        (lambda: distill.class_weighted_soft_loss(Z, T, [1.0, 1, 1, 1, -1]), "class_weights must not be negative"),
        (lambda: distill.class_weighted_soft_loss(Z, T, -jnp.ones(5)), "class_weights must not be negative"),
        (
            lambda: distill.detection_class_loss(Z, T, np.zeros(4, int), background_weight=-1.5),
            "background_weight must not be negative",
        ),
        (lambda: distill.moving_average(Z, T, 0.9, step=-1), "step must lie in"),
        (lambda: distill.adaptive_pool(jnp.ones((1, 4, 4, 1)), (0, 2)), "a height and a width from 1"),
        (lambda: distill.adaptive_pool(jnp.ones((1, 4, 4, 1)), 2), "a height and a width from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    weighted = jax.jit(lambda w: distill.ensemble_targets(np.stack([Z, T]), weights=[w, 1 - w]))(0.25)
    np.testing.assert_allclose(weighted, 0.25 * jax.nn.softmax(Z) + 0.75 * jax.nn.softmax(T), rtol=1e-5)


def test_kept_targets_are_not_an_array():
    """Probabilities or logits have no place there, nor one kind's targets in the other's loss."""
    kept, sampled = distill.top_k_targets(T, 3), distill.sampled_targets(jax.random.key(0), T, 3)
    for loss, wrong in (
        (distill.top_k_target_loss, (T, jnp.asarray(T), sampled)),
        (distill.sampled_target_loss, (T, kept)),
    ):
        for targets in wrong:
            with pytest.raises(TypeError, match=r"targets must be (TopK|Sampled)Targets, as .* makes them; got"):
                loss(Z, targets)


TOKENS = np.random.default_rng(2).normal(size=(4, 3, 3)).astype(np.float32)
MASKED = {
    "hard": lambda w: distill.hard_label_loss(Z, np.zeros(4, int), where=w),
    "hint": lambda w: distill.hint_loss(Z, T, where=w),
    "in_batch": lambda w: distill.in_batch_contrastive_loss(Z, T, where=w),
    "distances": lambda w: distill.distance_relation_loss(Z, T, where=w),
    "boxes": lambda w: distill.teacher_bounded_loss(Z, T, 2 * T, where=w),
    "fused": lambda w: distill.fused_distillation_loss(Z, np.eye(5), T, np.eye(5), where=w),
    "hidden": lambda w: distill.hidden_state_loss(TOKENS, -TOKENS, where=of_tokens(w)),
    "attention": lambda w: distill.attention_matrix_loss(TOKENS[:, None], -TOKENS[:, None], where=of_tokens(w)),
}


def of_tokens(w):
    return [[x] * 3 for x in w] if isinstance(w, list) else np.repeat(w[:, None], 3, 1)


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_may_be_of_integers_or_floats_as_tokenizers_give_it(name):
    mask = np.array([True, False, True, True])
    want = MASKED[name](mask)
    for same in (mask.astype(np.int32), mask.astype(np.float32), mask.tolist()):
        np.testing.assert_array_equal(MASKED[name](same), want)


def test_correlations_of_half_precision_are_made_in_float32():
    half = jnp.asarray(Z, jnp.bfloat16)
    made = distill.correlation_matrix(half)
    assert made.dtype == jnp.float32
    np.testing.assert_array_equal(made, distill.correlation_matrix(half.astype(jnp.float32)))


def test_class_similarity_keeps_its_shares_when_sharp():
    """Far below the smallest float beside the class itself, the others still stand in proportion to each other."""
    weights = np.random.default_rng(3).normal(size=(8, CLASSES))
    directions = weights / np.linalg.norm(weights, axis=0)
    scores = 300 * directions.T @ directions
    np.fill_diagonal(scores, -np.inf)
    want = np.exp(scores - scores.max(1, keepdims=True))
    want = 0.9 * np.eye(CLASSES) + 0.1 * want / want.sum(1, keepdims=True)
    weights = weights.astype(np.float32)
    got = distill.class_similarity_teacher(weights, np.arange(CLASSES), sharpness=300.0, confidence=0.9)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)


def test_decoupled_keeps_the_other_classes_apart_beside_a_huge_target():
    """With a target of 1e6 the others' logits, of order 1, must not be rounded away; NumPy in float64 says what is."""
    student, teacher = (np.random.default_rng(i).normal(size=(4, CLASSES)).astype(np.float32) for i in (4, 5))
    labels = np.arange(4)
    for z in (student, teacher):
        z[labels, labels] = 1e6
    want = []
    for s, t, y in zip(student.astype(float), teacher.astype(float), labels, strict=True):
        a, b = np.delete(t, y) / 4, np.delete(s, y) / 4
        p, q = (np.exp(x) / np.exp(x).sum() for x in (a, b))
        want.append(16 * 8 * np.sum(p * np.log(p / q)))  # the pairs (target, not target) agree: both are (1, 0)
    got = distill.decoupled_loss(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_contrast_at_a_low_temperature():
    """At T = 0.01 the constants are of order exp(100), beyond float32: kept as logarithms, the loss stays finite."""
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(20, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    memory = distill.contrast_memory(jax.random.key(0), 20, 8)
    memory = memory._replace(student=jnp.asarray(rows, jnp.float32), teacher=jnp.asarray(rows, jnp.float32))
    indices = np.arange(4)
    others = np.concatenate([indices[:, None], rng.integers(4, 20, (4, 6))], axis=1)
    losses, after = distill.contrastive_loss(rows[:4], rows[:4], memory, indices, others, temperature=0.01)
    log_x = np.einsum("bkd,bd->bk", rows[others], rows[:4]) / 0.01
    log_constant = np.logaddexp.reduce(log_x, axis=None) - np.log(log_x.size) + np.log(20)
    np.testing.assert_allclose(after.student_log_constant, log_constant, rtol=1e-5)
    x, c = np.exp(log_x - log_constant), 6 / 20
    one_side = -np.log(x[:, 0] / (x[:, 0] + c + 1e-7)) - np.log(c / (x[:, 1:] + c + 1e-7)).sum(1)
    np.testing.assert_allclose(losses, 2 * one_side, rtol=1e-4)
