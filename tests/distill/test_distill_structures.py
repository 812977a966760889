"""Transformers, detectors and sequences: masks, maps, bounds, samplers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcompress import distill, train


def encoder(rng, layers, width, heads=2, batch=3, tokens=4):
    hidden = list(rng.normal(size=(layers + 1, batch, tokens, width)).astype("float32"))
    return distill.LayerOutputs(hidden, list(rng.normal(size=(layers, batch, heads, tokens, tokens)).astype("float32")))


@pytest.fixture
def mask():
    return np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)


def test_uniform_map_of_the_paper():
    assert distill.uniform_layer_map(4, 12) == (0, 3, 6, 9, 12)
    assert distill.uniform_layer_map(6, 12)[-1] == 12


def test_hidden_states_see_real_tokens_only(rng, mask):
    s, t = rng.normal(size=(2, 3, 4, 5)).astype("float32")
    s[~mask] = np.nan
    value, gradient = jax.value_and_grad(lambda s: distill.hidden_state_loss(s, t, where=mask).sum())(s)
    want = [((s[i][mask[i]] - t[i][mask[i]]) ** 2).mean() for i in range(3)]
    np.testing.assert_allclose(value, sum(want), rtol=1e-5)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[~mask])
    nothing = distill.hidden_state_loss(s, t, where=np.zeros_like(mask))
    np.testing.assert_array_equal(nothing, 0)


def test_attention_scores_see_pairs_of_real_tokens(rng, mask):
    s, t = rng.normal(size=(2, 3, 2, 4, 4)).astype("float32")
    got = distill.attention_matrix_loss(s, t, where=mask)
    for i, n in enumerate((4, 2, 1)):
        np.testing.assert_allclose(got[i], ((s[i, :, :n, :n] - t[i, :, :n, :n]) ** 2).mean(), rtol=1e-5)


def test_masked_scores_count_as_zero_on_either_side():
    s, t = np.full((1, 1, 1, 2), -1e4, "float32"), np.array([[[[-1e30, 3.0]]]], "float32")
    np.testing.assert_allclose(distill.attention_matrix_loss(s, t), 9 / 2)


def test_intermediate_loss_over_a_given_map(rng, mask):
    student, teacher = encoder(rng, 2, 6), encoder(rng, 4, 9)
    projector = distill.dense_projector(6, 9)
    params = projector.init(jax.random.key(0))

    def project(h):
        return projector.apply(params, h)

    got = distill.intermediate_loss(student, teacher, project=project, layer_map=(0, 1, 4), where=mask)
    want = sum(
        distill.hidden_state_loss(project(student.hidden[m]), teacher.hidden[g], where=mask)
        for m, g in ((0, 0), (1, 1), (2, 4))
    )
    want += sum(
        distill.attention_matrix_loss(student.attention[m], teacher.attention[g], where=mask)
        for m, g in ((0, 0), (1, 3))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_phases_run_intermediate_layers_first(rng):
    z = rng.normal(size=(2, 3, 4)).astype("float32")
    calls = []

    def part(name, value):
        def of():
            calls.append(name)
            return jnp.full(3, value)

        return of

    totals = [
        distill.phase_loss(phase, part("layers", 2.0), part("prediction", 3.0))[0] for phase in distill.TINYBERT_PHASES
    ]
    assert [float(x) for x in totals] == [2.0, 2.0, 3.0] and calls == ["layers", "layers", "prediction"]
    assert [p.text for p in distill.TINYBERT_PHASES] == ["general", "task", "task"]
    both = distill.Phase("both", "task", "fine-tuned", 1.0, 0.5)
    np.testing.assert_allclose(distill.phase_loss(both, part("a", 2.0), part("b", 3.0)), 3.5)
    with pytest.raises(ValueError, match="both its weights are 0"):
        distill.phase_loss(both._replace(intermediate_weight=0.0, prediction_weight=0.0), lambda: z, lambda: z)


def test_background_weight_scales_the_background_alone(rng):
    s, t = rng.normal(size=(2, 5, 4)).astype("float32")
    plain = distill.class_weighted_soft_loss(s, t, np.ones(4, "float32"))
    np.testing.assert_allclose(plain, distill.soft_cross_entropy_loss(s, t), rtol=1e-5)
    heavy = distill.class_weighted_soft_loss(s, t, np.array([2.5, 1, 1, 1], "float32"))
    p_t, log_s = distill.temperature_softmax(t), distill.temperature_log_softmax(s)
    np.testing.assert_allclose(heavy - plain, -1.5 * p_t[:, 0] * log_s[:, 0], rtol=1e-4)


def test_detection_class_total(rng):
    s, t = rng.normal(size=(2, 5, 4)).astype("float32")
    labels = np.array([0, 1, 2, 3, 0])
    weights = np.array([1, 1, 1, 1.5], "float32")
    got = distill.detection_class_loss(s, t, labels, hard_weight=0.3, background=3)
    want = 0.3 * distill.hard_label_loss(s, labels) + 0.7 * distill.class_weighted_soft_loss(s, t, weights)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_teacher_bound_lets_a_better_student_go():
    target = np.zeros((3, 4), "float32")
    teacher = target + 1
    student = np.stack([target[0] + 2, target[0] + 0.5, target[0] + 0.99])
    np.testing.assert_allclose(distill.teacher_bounded_loss(student, teacher, target), [16, 0, 0])
    by_a_margin = distill.teacher_bounded_loss(student, teacher, target, margin=0.5)
    np.testing.assert_allclose(by_a_margin, [16, 0, 4 * 0.99**2], rtol=1e-6)
    total = distill.detection_box_loss(student, teacher, target, bound_weight=0.5)
    np.testing.assert_allclose(total, [4 * 1.5 + 8, 4 * 0.125, 4 * 0.99**2 / 2], rtol=1e-5)
    masked = distill.detection_box_loss(student * np.nan, teacher, target, where=np.zeros(3, bool))
    np.testing.assert_array_equal(masked, 0)


TRANSITIONS = np.array([[0.1, 0.7, 0.2, 0.0], [0.0, 0.2, 0.5, 0.3], [0.6, 0.0, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]])


def bigram(tokens):
    """A language model that knows the last token only; class 3 may end a sequence."""
    return jnp.log(jnp.asarray(TRANSITIONS, jnp.float32) + 1e-9)[tokens]


def test_samples_follow_the_model():
    prompts = np.zeros((4000, 1), int)
    sequences = distill.sample_sequences(jax.random.key(0), bigram, prompts, 4)
    counts = np.zeros((4, 4))
    np.add.at(counts, (sequences.tokens[:, :-1].ravel(), sequences.tokens[:, 1:].ravel()), 1)
    np.testing.assert_allclose(counts / counts.sum(1, keepdims=True), TRANSITIONS, atol=0.03)
    np.testing.assert_array_equal(sequences.where, np.tile([False, True, True, True], (4000, 1)))


def test_prompts_divided_by_a_shard_map():
    def write(prompts):
        return distill.sample_sequences(jax.random.key(0), bigram, prompts, 5, temperature=0, end_token=3)

    prompts = np.arange(16).reshape(16, 1) % 4
    sharded = jax.shard_map(write, mesh=train.make_mesh(), in_specs=P("data"), out_specs=P("data"))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(sharded)(prompts), write(prompts))


def test_greedy_samples_and_the_end_of_a_sequence():
    greedy = distill.sample_sequences(jax.random.key(0), bigram, np.array([[0], [1]]), 5, temperature=0)
    np.testing.assert_array_equal(greedy.tokens, [[0, 1, 2, 0, 1], [1, 2, 0, 1, 2]])
    ended = distill.sample_sequences(jax.random.key(1), bigram, np.zeros((200, 1), int), 12, end_token=3)
    tokens, where = np.asarray(ended.tokens), np.asarray(ended.where)
    for row, counts in zip(tokens, where, strict=True):
        ends = np.flatnonzero(row == 3)
        last = ends[0] if len(ends) else 11
        np.testing.assert_array_equal(counts, (np.arange(12) >= 1) & (np.arange(12) <= last))
        assert np.all(row[last + 1 :] == 3)


def test_sequence_level_loss_is_the_teachers_sequences_likelihood():
    sequences = distill.sample_sequences(jax.random.key(2), bigram, np.zeros((5, 1), int), 4)
    losses = distill.sequence_level_loss(bigram(sequences.tokens), sequences)
    tokens = np.asarray(sequences.tokens)
    np.testing.assert_allclose(losses, -np.log(TRANSITIONS[tokens[:, :-1], tokens[:, 1:]] + 1e-9), rtol=1e-4)


def test_sequence_level_student_learns_the_teachers_mode():
    """Trained on greedy sequences alone, the student's greedy path is the teacher's."""
    sequences = distill.sample_sequences(jax.random.key(0), bigram, np.array([[0], [1], [2]]), 6, temperature=0)
    table = jnp.zeros((4, 4))
    step = jax.jit(
        lambda w: w - jax.grad(lambda w: distill.sequence_level_loss(w[sequences.tokens], sequences).mean())(w)
    )
    for _ in range(50):
        table = step(table)
    prompts = np.array([[0], [1], [2]])
    copied = distill.sample_sequences(jax.random.key(0), lambda x: table[x], prompts, 6, temperature=0)
    np.testing.assert_array_equal(copied.tokens, sequences.tokens)


@pytest.mark.slow
def test_on_policy_student_reaches_the_teacher_where_it_goes():
    """The student learns from its own samples, scored by the teacher; no gradient passes through the sampling."""
    teacher = jnp.log(jnp.asarray(TRANSITIONS, jnp.float32) + 1e-3)
    table = jnp.zeros((4, 4))

    @jax.jit
    def step(table, key):
        sequences = distill.sample_sequences(key, lambda x: table[x], jnp.zeros((32, 1), int), 8)

        def loss(table):
            losses = distill.on_policy_loss(table[sequences.tokens], teacher[sequences.tokens], sequences, beta=0.5)
            return distill.masked_mean(losses, sequences.where[:, 1:])

        value, gradient = jax.value_and_grad(loss)(table)
        return table - 10 * gradient, value

    values = []
    for key in jax.random.split(jax.random.key(0), 150):
        table, value = step(table, key)
        values.append(float(value))
    assert np.mean(values[-10:]) < 0.05 * values[0]


def test_mixed_sequences_take_whole_rows(rng):
    a = distill.Sequences(jnp.ones((1000, 3), int), jnp.ones((1000, 3), bool))
    b = distill.Sequences(jnp.zeros((1000, 3), int), jnp.zeros((1000, 3), bool))
    mixed = distill.mix_sequences(jax.random.key(0), a, b, 0.3)
    np.testing.assert_array_equal(mixed.tokens.min(1), mixed.tokens.max(1))
    np.testing.assert_array_equal(mixed.tokens.astype(bool), mixed.where)
    assert abs(mixed.tokens[:, 0].mean() - 0.3) < 0.05


def test_bad_input(rng):
    student, teacher = encoder(rng, 2, 6), encoder(rng, 4, 6)
    h, boxes = student.hidden[0], np.zeros((2, 4), "float32")
    key, sequence = jax.random.key(0), distill.Sequences(jnp.zeros((1, 2), int), jnp.ones((1, 2), bool))
    longer = distill.Sequences(jnp.zeros((1, 3), int), jnp.ones((1, 3), bool))
    wrong = [
        (lambda: distill.uniform_layer_map(5, 12), "divide the teacher's"),
        (lambda: distill.intermediate_loss(student, teacher, layer_map=(0, 4, 2)), "layer_map must start with 0"),
        (lambda: distill.intermediate_loss(student, teacher, layer_map=(0, 4)), "rise through 2 layers"),
        (
            lambda: distill.intermediate_loss(student._replace(hidden=student.hidden[1:]), teacher),
            "one hidden state more",
        ),
        (lambda: distill.hidden_state_loss(h, h[..., :3]), "one shape"),
        (lambda: distill.attention_matrix_loss(h, h), "heads, tokens, tokens"),
        (
            lambda: distill.class_weighted_soft_loss(boxes, boxes, np.ones(3, "float32")),
            "class_weights must have shape",
        ),
        (lambda: distill.detection_class_loss(boxes, boxes, np.zeros(2, int), background=4), "background must be"),
        (lambda: distill.teacher_bounded_loss(boxes, boxes, boxes[:1]), "boxes and targets"),
        (lambda: distill.sample_sequences(key, bigram, np.zeros((1, 3), int), 3), "length must exceed"),
        (lambda: distill.sample_sequences(key, bigram, np.zeros((1, 1), int), 3, temperature=-1.0), "temperature"),
        (lambda: distill.mix_sequences(key, sequence, longer, 0.5), "one shape"),
        (lambda: distill.mix_sequences(key, sequence, sequence, 1.5), "student_share"),
        (lambda: distill.teacher_bounded_loss(boxes, boxes, boxes, margin=-1.0), "margin must not be below 0"),
        (lambda: distill.sample_sequences(key, bigram, np.zeros((1, 1)), 3), "prompts must be integers"),
        (lambda: distill.sample_sequences(key, bigram, np.zeros(1, int), 3), r"\[batch, prompt\]"),
    ]
    for call, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message):
            call()
