"""Every public loss has finite values and gradients on every finite input: zeros, duplicates, one row, huge values."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcompress import distill

SOFT, OTHER = 1e30, 1e4  # how large a softmax loss's logits and any other loss's inputs may be


def labels(student):
    return jnp.arange(student.shape[0]) % student.shape[-1]


def labelled(loss, **kwargs):
    return lambda s, t: loss(s, t, labels(s), **kwargs)


def encoder(x):
    """Hidden states and attention scores of two layers, all from one array `[batch, 3, 4]`."""
    attention = jnp.einsum("btd,bsd->bts", x, jnp.ones_like(x))[:, None]
    return distill.LayerOutputs([x, x[:, ::-1], -x], [attention, -attention])


def sequences(s):
    tokens = jnp.zeros(s.shape[:2], int)
    return distill.Sequences(tokens, jnp.ones(s.shape[:2], bool))


def crd(s, t):
    memory = distill.contrast_memory(jax.random.key(0), 5, 4)
    heads = distill.contrastive_heads(4, 4, 4)
    embeddings = heads.apply(heads.init(jax.random.key(1)), (s, t))
    contrast = jnp.array([[0, 1, 2]]).repeat(len(s), 0)
    return distill.contrastive_loss(*embeddings, memory, jnp.zeros(len(s), int), contrast)[0]


def projected(projector, loss):
    return lambda s, t: loss(projector.apply(projector.init(jax.random.key(0)), s), t)


def through_convolution(s, t):
    params = HINT.init(jax.random.key(0))
    return distill.hint_loss(HINT.apply(params, s), t)


EYE = jnp.eye(4)
HINT = distill.conv_projector((4, 4, 2), (4, 4, 2), batch_norm=True)
VID = distill.variational_projector(2, 2)
ROWS, MAPS, TOKENS = (4,), (4, 4, 2), (3, 4)

LOSSES = {
    "soft_target_loss": (lambda s, t: distill.soft_target_loss(s, t, temperature=20.0), ROWS, SOFT),
    "soft_cross_entropy_loss": (distill.soft_cross_entropy_loss, ROWS, SOFT),
    "hard_label_loss": (lambda s, t: distill.hard_label_loss(s, labels(s)), ROWS, SOFT),
    "distillation_loss": (labelled(distill.distillation_loss), ROWS, SOFT),
    "weighted_distillation_loss": (labelled(distill.weighted_distillation_loss), ROWS, SOFT),
    "soft_label_loss": (lambda s, t: distill.soft_label_loss(s, jax.nn.softmax(t), temperature=2.0), ROWS, SOFT),
    "decoupled_loss": (labelled(distill.decoupled_loss), ROWS, SOFT),
    "standardized_soft_target_loss": (distill.standardized_soft_target_loss, ROWS, SOFT),
    "reverse_kl_loss": (distill.reverse_kl_loss, ROWS, SOFT),
    "jensen_shannon_loss": (distill.jensen_shannon_loss, ROWS, SOFT),
    "dist_loss": (distill.dist_loss, ROWS, SOFT),
    "batch_correlation_loss": (distill.batch_correlation_loss, ROWS, SOFT),
    "class_correlation_loss": (distill.class_correlation_loss, ROWS, SOFT),
    "multi_level_loss": (lambda s, t: distill.multi_level_loss(s, t, [3.0]), ROWS, SOFT),
    "label_smoothing_loss": (lambda s, t: distill.label_smoothing_loss(s, labels(s)), ROWS, SOFT),
    "teacher_free_loss": (lambda s, t: distill.teacher_free_loss(s, labels(s)), ROWS, SOFT),
    "top_k_loss": (lambda s, t: distill.top_k_loss(s, t, 2), ROWS, SOFT),
    "top_k_loss renormalised": (lambda s, t: distill.top_k_loss(s, t, 2, tail=False, support="student"), ROWS, SOFT),
    "top_k_loss reverse": (lambda s, t: distill.top_k_loss(s, t, 0.5, beta=1.0), ROWS, SOFT),
    "top_k_loss of all": (lambda s, t: distill.top_k_loss(s, t, 4, beta=0.5), ROWS, SOFT),
    "top_k_target_loss": (lambda s, t: distill.top_k_target_loss(s, distill.top_k_targets(t, 2)), ROWS, SOFT),
    "sampled_target_loss": (
        lambda s, t: distill.sampled_target_loss(s, distill.sampled_targets(jax.random.key(0), t, 3)), ROWS, SOFT
    ),
    "fused_distillation_loss": (
        lambda s, t: distill.fused_distillation_loss(s, EYE, t, EYE, labels(s), alpha=0.5, beta=0.5, chunk=2),
        ROWS, SOFT,
    ),
    "several_teachers_loss": (lambda s, t: distill.several_teachers_loss(s, jnp.stack([t, -t])), ROWS, SOFT),
    "mutual_learning_loss": (lambda s, t: distill.mutual_learning_loss([s, t, s + 1], labels(s)), ROWS, SOFT),
    "class_weighted_soft_loss": (lambda s, t: distill.class_weighted_soft_loss(s, t, jnp.arange(4.0)), ROWS, SOFT),
    "detection_class_loss": (labelled(distill.detection_class_loss), ROWS, SOFT),
    "sequence_level_loss": (lambda s, t: distill.sequence_level_loss(s, sequences(s)), TOKENS, SOFT),
    "on_policy_loss": (lambda s, t: distill.on_policy_loss(s, t, sequences(s)), TOKENS, SOFT),
    "logit_matching_loss": (distill.logit_matching_loss, ROWS, OTHER),
    "logit_matching_loss centred": (lambda s, t: distill.logit_matching_loss(s, t, centred=True), ROWS, OTHER),
    "hint_loss": (distill.hint_loss, MAPS, OTHER),
    "hint_loss projected": (through_convolution, MAPS, OTHER),
    "variational_information_loss": (
        projected(VID, lambda m, t: distill.variational_information_loss(m, t, jnp.array([1e4, -1e4]))), MAPS, OTHER
    ),
    "factor_transfer_loss": (distill.factor_transfer_loss, MAPS, OTHER),
    "factor_transfer_loss collapsed": (
        lambda s, t: distill.factor_transfer_loss(s, t, order=2, collapse_channels=True), MAPS, OTHER
    ),
    "review_loss": (distill.review_loss, MAPS, OTHER),
    "attention_transfer_loss": (distill.attention_transfer_loss, MAPS, OTHER),
    "attention_transfer_loss 8th powers": (
        lambda s, t: distill.attention_transfer_loss(s, t, power=8, norm_order=2), MAPS, OTHER
    ),
    "attention_transfer_loss sum": (
        lambda s, t: distill.attention_transfer_loss(s, t, kind="sum", norm_order=1), MAPS, OTHER
    ),
    "attention_transfer_loss max": (
        lambda s, t: distill.attention_transfer_loss(s, t, kind="power_max", power=1.5, norm_order=2.5), MAPS, OTHER
    ),
    "flow_loss": (lambda s, t: distill.flow_loss((s, s[..., ::-1]), (t, t)), MAPS, OTHER),
    "flow_loss by column": (
        lambda s, t: distill.flow_loss((s, s[:, :2, :2]), (t, t[:, :2, :2]), pool="max", by_column=True), MAPS, OTHER
    ),
    "inter_channel_loss": (distill.inter_channel_loss, MAPS, OTHER),
    "neuron_selectivity_loss": (distill.neuron_selectivity_loss, MAPS, OTHER),
    "activation_boundary_loss": (distill.activation_boundary_loss, MAPS, OTHER),
    "margin_relu_loss": (lambda s, t: distill.margin_relu_loss(s, t, jnp.array([-0.5, -2.0])), MAPS, OTHER),
    "distance_relation_loss": (distill.distance_relation_loss, ROWS, OTHER),
    "angle_relation_loss": (distill.angle_relation_loss, ROWS, OTHER),
    "relational_loss": (distill.relational_loss, ROWS, OTHER),
    "similarity_preserving_loss": (distill.similarity_preserving_loss, ROWS, OTHER),
    "correlation_congruence_loss": (distill.correlation_congruence_loss, ROWS, OTHER),
    "correlation_congruence_loss bilinear": (
        lambda s, t: distill.correlation_congruence_loss(s, t, kernel="bilinear", normalize=False), ROWS, OTHER
    ),
    "consecutive_correlation_loss": (distill.consecutive_correlation_loss, ROWS, OTHER),
    "probabilistic_transfer_loss": (distill.probabilistic_transfer_loss, ROWS, OTHER),
    "contrast_loss": (lambda s, t: distill.contrast_loss(s, 10), ROWS, OTHER),
    "contrastive_loss": (crd, ROWS, OTHER),
    "in_batch_contrastive_loss": (distill.in_batch_contrastive_loss, ROWS, OTHER),
    "hidden_state_loss": (distill.hidden_state_loss, TOKENS, OTHER),
    "attention_matrix_loss": (lambda s, t: distill.attention_matrix_loss(s[:, None], t[:, None]), (4, 4), OTHER),
    "intermediate_loss": (lambda s, t: distill.intermediate_loss(encoder(s), encoder(t)), TOKENS, OTHER),
    "phase_loss": (
        lambda s, t: distill.phase_loss(
            distill.TINYBERT_PHASES[2], lambda: jnp.zeros(()), lambda: distill.soft_cross_entropy_loss(s, t)
        ), ROWS, SOFT,
    ),
    "teacher_bounded_loss": (lambda s, t: distill.teacher_bounded_loss(s, t, -t, margin=1.0), ROWS, OTHER),
    "detection_box_loss": (lambda s, t: distill.detection_box_loss(s, t, -t), ROWS, OTHER),
}  # fmt: skip


def test_no_public_loss_is_left_out():
    public = {name for name in distill.__all__ if name.endswith("_loss")}
    assert {name.split()[0] for name in LOSSES} == public
    assert all(inspect.getdoc(getattr(distill, name)) for name in distill.__all__)


def inputs(batch, shape, limit):
    """Pairs of arrays of ordinary, special and extreme entries; the student's may repeat."""
    special = st.sampled_from([0.0, 1.0, -1.0, limit, -limit, 1e-20, 3e-5])
    entries = special | st.floats(-np.float32(limit).item(), np.float32(limit).item(), width=32, allow_subnormal=False)
    array = hnp.arrays(np.float32, (batch, *shape), elements=entries, fill=special)

    def make(student, teacher, how):
        if how == "duplicates":
            student = np.repeat(student[:1], batch, 0)
        elif how == "constant":
            student = np.full_like(student, student.flat[0])
        elif how == "agreement":
            student = teacher.copy()
        elif how == "zeros":
            student = np.zeros_like(student)
        return student, teacher

    return st.builds(make, array, array, st.sampled_from(["plain", "duplicates", "constant", "agreement", "zeros"]))


OF_A_BATCH = [  # the others see each example alone, as tested below, so that three rows stand for one
    name
    for name in LOSSES
    if "where" not in inspect.signature(getattr(distill, name.split()[0])).parameters
    or "in_batch" in name
    or "fused" in name
]


@pytest.mark.parametrize("name,batch", [(n, 3) for n in LOSSES] + [(n, 1) for n in OF_A_BATCH])
def test_finite(name, batch):
    loss, shape, limit = LOSSES[name]

    @jax.jit
    def value_and_gradient(student, teacher):
        value, pull = jax.vjp(lambda s: loss(s, teacher), student)
        return value, pull(jnp.ones_like(value) / value.size)[0]

    @given(inputs(batch, shape, limit))
    @settings(max_examples=25, deadline=None, database=None)
    def check(pair):
        value, gradient = value_and_gradient(*pair)
        assert np.all(np.isfinite(value)), value
        assert np.all(np.isfinite(gradient)), gradient

    check()


@pytest.mark.parametrize("name", [n for n in LOSSES if " " not in n])
def test_constant_teacher_and_per_example_convention(name, rng):
    """No gradient reaches the teacher; a loss that returns a vector sees each example alone."""
    if name in ("mutual_learning_loss", "contrastive_loss"):
        pytest.skip("peers learn from each other; the teacher's head learns")
    loss, shape, _ = LOSSES[name]
    student, teacher = rng.normal(size=(2, 3, *shape)).astype("float32")

    @jax.jit
    def both(s, t):
        return loss(s, t), jax.grad(lambda t: jnp.sum(loss(s, t)))(t)

    value, gradient = both(student, teacher)
    if name not in ("teacher_bounded_loss", "detection_box_loss"):  # here -teacher stands for the targets
        assert not np.any(gradient)
    if value.ndim and name != "in_batch_contrastive_loss":
        assert value.shape[0] == 3
        other = student.copy()
        other[1] += 1
        np.testing.assert_array_equal(np.delete(both(other, teacher)[0], 1, 0), np.delete(value, 1, 0))


@pytest.mark.parametrize("name", [n for n in LOSSES if " " not in n])
def test_padded_examples_count_nothing(name, rng):
    function = getattr(distill, name)
    if "where" not in inspect.signature(function).parameters:
        pytest.skip("it has its own mask")
    if name in (
        "flow_loss",
        "mutual_learning_loss",
        "hidden_state_loss",
        "attention_matrix_loss",
        "intermediate_loss",
        "top_k_target_loss",
        "sampled_target_loss",
        "fused_distillation_loss",
        "contrastive_loss",
    ):
        pytest.skip("tested on its own")
    loss, shape, _ = LOSSES[name]
    if not jax.eval_shape(loss, *(np.zeros((3, *shape), "float32"),) * 2).shape:
        pytest.skip("a scalar of the whole batch: tested in test_distill_masked.py")
    student, teacher = rng.normal(size=(2, 3, *shape)).astype("float32")
    args = inspect.signature(function).parameters
    extra = {}
    if "labels" in args:
        extra["labels"] = np.array([0, -100, 2])
    for key, value in (("log_scale", np.zeros(2)), ("margin", np.full(2, -0.5)), ("class_weights", np.ones(4))):
        if key in args and args[key].default is inspect.Parameter.empty:
            extra[key] = value.astype("float32")
    if name == "top_k_loss":
        extra["k"] = 2
    if name == "several_teachers_loss":
        teacher = np.stack([teacher, -teacher])
    if name == "soft_label_loss":
        teacher = np.asarray(distill.temperature_softmax(teacher))
    where = np.array([True, False, True])
    student[1] = np.nan
    sides = (student,) if "teacher" not in str(args) and "targets" not in args else (student, teacher)
    if name in ("teacher_bounded_loss", "detection_box_loss"):
        sides = (student, teacher, teacher)

    @jax.jit
    def value_and_gradient(student):
        value, pull = jax.vjp(lambda s: function(s, *sides[1:], where=where, **extra), student)
        return value, pull(jnp.ones_like(value))[0]

    value, gradient = value_and_gradient(student)
    assert value[1] == 0 and np.all(np.isfinite(value))
    assert not np.any(gradient[1]) and np.all(np.isfinite(gradient)) and np.any(gradient[0])


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch(name):
    """A device's part of a batch may hold no example: no value for each of them, or the value of nothing."""
    loss, shape, _ = LOSSES[name]
    student = teacher = jnp.zeros((0, *shape))
    value, pull = jax.vjp(lambda s: loss(s, teacher), student)
    assert value.size == 0 or (value.shape == () and value == 0)
    assert pull(jnp.ones_like(value))[0].shape == student.shape


def test_the_mean_of_no_losses_is_zero():
    assert distill.masked_mean(jnp.zeros(0)) == 0


@pytest.mark.parametrize("name", [
    "batch_correlation_loss", "multi_level_loss", "relational_loss", "similarity_preserving_loss",
    "correlation_congruence_loss", "probabilistic_transfer_loss", "consecutive_correlation_loss",
])  # fmt: skip
def test_float32_stays_float32_where_float64_is_allowed(name, rng):
    loss = getattr(distill, name)
    student, teacher = rng.normal(size=(2, 3, 4)).astype("float32")
    with jax.enable_x64(True):
        for where in (None, np.array([True, False, True])):
            assert loss(student, teacher, where=where).dtype == "float32"


@pytest.mark.parametrize("name", [
    "distance_relation_loss", "angle_relation_loss", "similarity_preserving_loss", "correlation_congruence_loss",
    "probabilistic_transfer_loss", "in_batch_contrastive_loss",
])  # fmt: skip
def test_one_entry_that_float32_barely_holds(name, rng):
    """Its reciprocal is flushed to zero."""
    student, teacher = rng.normal(size=(2, 4, 6)).astype("float32")
    student[:2, 2] = 3e38, -3e38
    value, pull = jax.vjp(lambda s: getattr(distill, name)(s, teacher), student)
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(pull(jnp.ones_like(value))[0]))
