"""Schedules, moving averages, chains, refinery and MUNGE: each with the effect that it exists for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress import distill


def test_early_stopping_at_a_step():
    weight = jax.jit(distill.early_stopped(0.9, 10))
    np.testing.assert_allclose([weight(s) for s in (0, 9, 10, 1000)], [0.9, 0.9, 0, 0])
    fading = distill.early_stopped(1.0, 10, fade=4)
    np.testing.assert_allclose([fading(s) for s in (9, 10, 12, 13, 14)], [1, 0.8, 0.4, 0.2, 0], atol=1e-6)


def test_early_stopping_frees_the_student_from_a_wrong_teacher():
    """After the stop the student goes on to the labels; with the term kept it stays between them and the teacher."""
    teacher, labels = jnp.array([[4.0, 0.0]]), jnp.array([1])

    def train(schedule):
        z = jnp.zeros((1, 2))
        optimizer = optax.sgd(0.3)
        state = optimizer.init(z)

        @jax.jit
        def update(z, state, step):
            loss = lambda z: distill.distillation_loss(z, teacher, labels, alpha=schedule(step), temperature=1.0).sum()  # noqa: E731
            updates, state = optimizer.update(jax.grad(loss)(z), state)
            return optax.apply_updates(z, updates), state

        for step in range(150):
            z, state = update(z, state, step)
        return jax.nn.softmax(z)[0, 1]

    assert train(distill.early_stopped(0.9, 50)) > 0.9
    assert train(distill.early_stopped(0.9, 150)) < 0.3


def test_warm_up_and_annealing():
    np.testing.assert_allclose([distill.warmed_up(8.0, 20)(s) for s in (0, 10, 20, 99)], [0, 4, 8, 8])
    temperature = distill.annealed_temperature(10.0, 1.0, 9)
    np.testing.assert_allclose([temperature(s) for s in (0, 3, 9, 50)], [10, 7, 1, 1])


def test_hints_come_first():
    weights = jax.jit(distill.hints_first(3))
    assert [(float(weights(s).hint), float(weights(s).soft_target)) for s in (0, 2, 3)] == [(1, 0), (1, 0), (0, 1)]


def test_moving_average_is_the_weighted_sum_of_the_past(rng):
    past = rng.normal(size=(6, 3)).astype("float32")
    teacher = {"w": jnp.zeros(3), "steps": jnp.array(0)}
    for i, w in enumerate(past):
        teacher = distill.moving_average(teacher, {"w": w, "steps": jnp.array(i)}, 0.9)
    want = sum(0.1 * 0.9 ** (5 - i) * w for i, w in enumerate(past))
    np.testing.assert_allclose(teacher["w"], want, rtol=1e-5, atol=1e-6)
    assert teacher["steps"] == 5


def test_moving_average_starts_as_the_plain_mean(rng):
    past = rng.normal(size=(6, 3)).astype("float32")
    teacher = jnp.full(3, 100.0)
    update = jax.jit(functools.partial(distill.moving_average, decay=0.999))
    for i, w in enumerate(past):
        teacher = update(teacher, w, step=i)
    np.testing.assert_allclose(teacher, past.mean(0), rtol=1e-4, atol=1e-5)


def test_moving_average_keeps_dtype_and_is_steadier_than_the_student(rng):
    assert distill.moving_average(jnp.zeros(2, "bfloat16"), jnp.ones(2), 0.5).dtype == jnp.bfloat16
    assert distill.moving_average(jnp.complex64(1), jnp.complex64(3j), 0.5) == 0.5 + 1.5j
    codes = jnp.ones(2, "float8_e4m3fn")  # of a compressed weight
    assert distill.moving_average(codes, 2 * codes, 0.5).tolist() == [2, 2]
    noisy = 1 + rng.normal(size=(400, 1)).astype("float32")
    teacher, seen = jnp.ones(1), []
    for w in noisy:
        teacher = distill.moving_average(teacher, w, 0.95)
        seen.append(teacher[0])
    assert np.std(seen[100:]) < 0.3 * np.std(noisy[100:])


def test_teaching_chain_passes_each_student_on():
    calls = []

    def train(size, teacher):
        calls.append((size, teacher))
        return f"net{size}"

    assert distill.teaching_chain(train, [8, 4, 2], "net16") == ["net8", "net4", "net2"]
    assert calls == [(8, "net16"), (4, "net8"), (2, "net4")]
    assert distill.teaching_chain(train, [1, 1]) == ["net1", "net1"] and calls[3:] == [(1, None), (1, "net1")]


def fit(key, x, targets, x_test, steps=300):
    """A linear softmax classifier on soft labels; its logits on `x_test`."""
    w = 0.01 * jax.random.normal(key, (x.shape[1], targets.shape[1]))
    optimizer = optax.adam(0.05)

    def step(carry, _):
        w, state = carry
        gradient = jax.grad(lambda w: distill.soft_label_loss(x @ w, targets).mean())(w)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.lax.scan(step, (w, optimizer.init(w)), length=steps)
    return x_test @ w


def noisy_task(seed):
    """200 examples of 40 features, three classes, a quarter of the labels wrong; and clean test examples."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(40, 3))
    x, x_test = rng.normal(size=(200, 40)).astype("float32"), rng.normal(size=(1000, 40)).astype("float32")
    labels = (x @ truth).argmax(1)
    labels = np.where(rng.random(200) < 0.25, rng.integers(0, 3, 200), labels)
    return x, labels, x_test, (x_test @ truth).argmax(1)


def test_ensemble_of_bootstrapped_teachers_beats_one_as_a_teacher():
    """The student of five teachers is nearer the truth than the student of one, over several draws of the data."""
    train = jax.jit(fit)
    accuracies = []
    for seed in range(4):
        x, labels, x_test, truth = noisy_task(seed)
        rng, key = np.random.default_rng(seed + 100), jax.random.key(seed)
        hard = np.asarray(jax.nn.one_hot(labels, 3))
        rows = [rng.integers(0, 200, 200) for _ in range(5)]
        teachers = jnp.stack([train(key, x[r], hard[r], x) for r in rows])
        students = [train(key, x, distill.ensemble_targets(teachers[:n], temperature=2.0), x_test) for n in (1, 5)]
        accuracies.append([np.mean(z.argmax(1) == truth) for z in students])
    alone, together = np.mean(accuracies, axis=0)
    assert together > alone + 0.01, accuracies


def test_refined_labels_follow_the_crop():
    """Two crops of one image with different content get different labels, those of the teacher on each."""

    def teacher(images):
        return jnp.stack([images.mean((1, 2)) * 10, jnp.zeros(len(images))], axis=-1)

    image = np.concatenate([np.zeros((1, 4, 4)), np.ones((1, 4, 4))], axis=2).astype("float32")
    crops = np.stack([image[:, :, :4], image[:, :, 4:]], axis=1)
    labels = np.asarray(distill.refined_labels(teacher, crops))
    assert labels.shape == (1, 2, 2)
    np.testing.assert_allclose(labels[0, :, 0], [0.5, 1 / (1 + np.exp(-10))], rtol=1e-5)
    with pytest.raises(ValueError, match="crops must be"):
        distill.refined_labels(teacher, np.zeros((2, 3)))


def ring(rng, rows):
    angle = rng.uniform(0, 2 * np.pi, rows)
    return np.stack([np.cos(angle), np.sin(angle)], 1).astype("float32")


def test_munge_stays_on_the_manifold_where_independent_draws_do_not(rng):
    """The paper's argument: points near a ring stay near it; drawing each attribute alone fills the square."""
    data = ring(rng, 300)
    made = np.asarray(distill.munge(jax.random.key(0), data, rounds=2, swap_probability=0.5, local_variance=5.0))
    assert made.shape == (600, 2)
    off = np.abs(np.linalg.norm(made, axis=1) - 1)
    independent = np.stack([rng.permutation(data[:, 0]), rng.permutation(data[:, 1])], 1)
    off_independent = np.abs(np.linalg.norm(independent, axis=1) - 1)
    assert off.mean() < 0.1 * off_independent.mean()
    assert np.mean(np.min(np.abs(made[:, None] - data[None]).sum(-1), axis=1) > 1e-6) > 0.5  # new points, not copies


def test_munge_without_swaps_is_the_table_and_keeps_categories(rng):
    table = np.concatenate([ring(rng, 50), rng.integers(0, 3, (50, 1))], axis=1).astype("float32")
    flags = np.array([False, False, True])
    same = distill.munge(jax.random.key(1), table, swap_probability=0.0, categorical=flags)
    np.testing.assert_array_equal(same, table)
    made = np.asarray(distill.munge(jax.random.key(1), table, swap_probability=0.8, categorical=flags, rounds=3))
    assert set(made[:, 2]) <= {0.0, 1.0, 2.0}
    for r in range(3):  # a swap moves categories about and makes none
        np.testing.assert_array_equal(np.sort(made[50 * r : 50 * r + 50, 2]), np.sort(table[:, 2]))
    again = distill.munge(jax.random.key(1), table, swap_probability=0.8, categorical=flags, rounds=3)
    np.testing.assert_array_equal(made, again)


def test_bad_input():
    key, table = jax.random.key(0), np.zeros((3, 2), "float32")
    wrong = [
        (lambda: distill.early_stopped(1.0, -1), "must not be negative"),
        (lambda: distill.warmed_up(1.0, 0), "steps must be above 0"),
        (lambda: distill.annealed_temperature(0.0, 1.0, 5), "start must be above 0"),
        (lambda: distill.hints_first(-1), "hint_steps"),
        (lambda: distill.moving_average({"a": table}, {"b": table}, 0.9), "one structure"),
        (lambda: distill.moving_average(table, table, 1.5), "decay must lie in"),
        (lambda: distill.munge(key, table[0]), r"\[rows, attributes\]"),
        (lambda: distill.munge(key, table[:1]), "at least 2 rows"),
        (lambda: distill.munge(key, table, swap_probability=2.0), "swap_probability"),
        (lambda: distill.munge(key, table, local_variance=0.0), "local_variance"),
        (lambda: distill.munge(key, table, rounds=0), "rounds"),
        (lambda: distill.munge(key, table, categorical=[True]), "categorical must have shape"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
