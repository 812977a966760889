"""Every way of teaching over `train.make_step`, on digits, with the effect that it exists for.

Each network here is three: the same MLP under three initialisations and draws of noisy labels, side by side in one
step, so that an effect is a mean over three. The test images are none of those trained on.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from jaxcompress import distill, train

ORDER = np.random.default_rng(0).permutation(1797)
IMAGES, LABELS = (np.asarray(part)[ORDER] for part in load_digits(return_X_y=True))
IMAGES, LABELS = (IMAGES / 16).astype(np.float32), LABELS.astype(np.int32)
ROWS, COPIES = 400, 3
X, Y, X_TEST, Y_TEST = IMAGES[:ROWS], LABELS[:ROWS], IMAGES[800:], LABELS[800:]
EVEN = np.full((COPIES, ROWS, 10), 0.1, np.float32)
TX = optax.adam(1e-2)


def init(seed, widths=(64, 32, 10)):
    rng = np.random.default_rng(seed)
    return [
        {
            "kernel": jnp.asarray(rng.normal(size=(COPIES, n, m)) * np.sqrt(2 / n), jnp.float32),
            "bias": jnp.zeros((COPIES, m)),
        }
        for n, m in itertools.pairwise(widths)
    ]


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def apply(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def loss_fn(params, batch, context):
    logits = apply(params, batch["x"])
    where = jnp.broadcast_to(batch["where"], logits.shape[:-1])
    soft = distill.soft_label_loss(logits, batch["targets"], temperature=batch["temperature"], where=where)
    hard = distill.hard_label_loss(logits, batch["labels"], where=where)
    losses = batch["alpha"] * soft + (1 - batch["alpha"]) * hard
    return COPIES * distill.masked_mean(losses, where), {}, context.extras


step = train.make_step(loss_fn, TX)


def run(step, state, batch, steps):
    batch = jax.device_put(batch)
    for _ in range(steps):
        state, _ = step(state, batch)
    return state


def fit(seed, *, x=X, labels=Y, targets=None, alpha=None, temperature=1.0, where=True, steps=100, widths=(64, 32, 10)):
    """Parameters of three networks: from labels alone, or, with targets, from those, or from both as alpha says."""
    alpha = (0.0 if targets is None else 1.0) if alpha is None else alpha
    schedule = alpha if callable(alpha) else lambda step: alpha
    state = train.TrainState.create(init(seed, widths), TX, key=jax.random.key(0))
    batch = jax.device_put(
        {
            "x": x,
            "labels": np.broadcast_to(labels, (COPIES, ROWS)),
            "targets": np.asarray(EVEN if targets is None else targets, np.float32),
            "temperature": np.float32(temperature),
            "where": np.broadcast_to(where, (ROWS,)),
        }
    )
    for k in range(steps):
        state, _ = step(state, batch | {"alpha": np.float32(schedule(k))})
    return state.params


def accuracy(params, x=X_TEST):
    return float((np.asarray(apply(params, x)).argmax(-1) == Y_TEST).mean())


def soft(params, x=X, temperature=1.0):
    return distill.temperature_softmax(apply(params, x), temperature)


def noisy_labels(seed):
    """Half of the labels drawn anew, for each copy."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((COPIES, ROWS)) < 0.5, rng.integers(0, 10, (COPIES, ROWS)), Y).astype(np.int32)


@functools.cache
def teacher():
    return fit(0, steps=200)


@functools.cache
def misled():
    """A teacher that has learned its wrong labels by heart, and the same after the first 25 steps."""
    return fit(1, labels=noisy_labels(0), steps=300), fit(1, labels=noisy_labels(0), steps=25)


FEW = np.arange(ROWS) < 40


@functools.cache
def taught_on_few():
    return accuracy(fit(3, targets=soft(teacher(), temperature=2.0), temperature=2.0, where=FEW))


def test_one_teacher_on_few_examples_and_on_an_unlabelled_transfer_set():
    """Of forty images a student learns more from soft targets than from labels, and yet more from unlabelled ones."""
    from_labels = accuracy(fit(3, where=FEW))
    with_both = accuracy(fit(3, targets=soft(teacher(), temperature=2.0), alpha=0.9, temperature=2.0, where=FEW))
    everything = accuracy(fit(3, labels=0 * Y, targets=soft(teacher(), temperature=2.0), temperature=2.0))
    assert from_labels + 0.04 < with_both
    assert from_labels + 0.04 < taught_on_few() < everything - 0.04
    assert everything > accuracy(teacher()) - 0.03


@pytest.mark.slow
def test_munge_makes_a_transfer_set_of_a_few_rows():
    """Labelled by the teacher, 360 made-up rows beside the forty teach what the forty alone do not."""
    made = distill.munge(jax.random.key(0), X[FEW], rounds=9, swap_probability=0.3, local_variance=2.0)
    x = np.concatenate([X[FEW], made])
    targets = soft(teacher(), x, 2.0)
    assert accuracy(fit(3, x=x, labels=0 * Y, targets=targets, temperature=2.0)) > taught_on_few() + 0.03


@functools.cache
def crowd():
    """The logits of five teachers, each misled by its own half of wrong labels: [teachers, copies, rows, classes]."""
    return jnp.stack([apply(fit(10 + i, labels=noisy_labels(i)), X) for i in range(5)])


@functools.cache
def taught_by_one_of_the_crowd():
    return np.mean([accuracy(fit(2, targets=distill.temperature_softmax(z))) for z in crowd()[:2]])


@pytest.mark.parametrize("mean", ["probabilities", "logits", "log_probabilities"])
@pytest.mark.slow
def test_an_ensemble_teaches_better_than_its_members(mean):
    targets = distill.ensemble_targets(crowd(), mean=mean)
    assert accuracy(fit(2, targets=targets)) > taught_by_one_of_the_crowd() + 0.1


@pytest.mark.slow
def test_a_weighted_ensemble_can_leave_a_bad_member_out():
    """A sixth teacher that says the opposite, with weight 0: the targets, and so the student, of the five."""
    six = jnp.concatenate([crowd(), -5 * crowd()[:1]])
    without = distill.ensemble_targets(six, weights=[1, 1, 1, 1, 1, 0])
    np.testing.assert_allclose(without, distill.ensemble_targets(crowd()), rtol=1e-5, atol=1e-6)
    assert accuracy(fit(2, targets=distill.ensemble_targets(six))) < accuracy(fit(2, targets=without)) - 0.02


@pytest.mark.slow
def test_several_teachers_at_once_are_their_ensemble_in_training():
    """The same parameters as on the mean of probabilities, while the loss shows the teachers' own distance."""

    def several(params, batch, context):
        losses = distill.several_teachers_loss(apply(params, batch["x"]), context.frozen)
        return COPIES * losses.mean(), {}, context.extras

    learn = train.make_step(several, TX)
    state = train.TrainState.create(init(2), TX, key=jax.random.key(0))
    for _ in range(100):
        state, metrics = learn(state, {"x": X}, crowd())
    assert abs(accuracy(state.params) - accuracy(fit(2, targets=distill.ensemble_targets(crowd())))) < 0.01
    assert metrics["loss"] > 1  # the teachers contradict each other, whoever follows them


@pytest.mark.slow
def test_hints_first_give_soft_targets_a_start():
    """FitNet's two stages in one schedule: after hints, twenty steps of soft targets go further than from scratch."""
    regressor = distill.dense_projector(32, 32)

    def hidden(params, x):
        return jax.nn.relu(jnp.einsum("bi,cij->cbj", x, params[0]["kernel"]) + params[0]["bias"][:, None])

    def staged(params, batch, context):
        weights = distill.hints_first(HINT_STEPS)(context.step - batch["skipped"])
        guided = jax.vmap(regressor.apply)(params["regressor"], hidden(params["student"], batch["x"]))
        hints = jax.vmap(distill.hint_loss)(guided, hidden(context.frozen, batch["x"])).mean()
        logits, above = (apply(p, batch["x"]) for p in (params["student"], context.frozen))
        taught = distill.soft_target_loss(logits, above, temperature=2.0).mean()
        return COPIES * (weights.hint * hints + weights.soft_target * taught), {}, context.extras

    learn, found = train.make_step(staged, TX), {}
    for hint_steps in (HINT_STEPS, 0):
        params = {
            "student": init(50),
            "regressor": jax.vmap(regressor.init)(jax.random.split(jax.random.key(0), COPIES)),
        }
        state = train.TrainState.create(params, TX, key=jax.random.key(0))
        for k in range(hint_steps + 20):
            state, _ = learn(state, {"x": X, "skipped": np.int32(hint_steps - HINT_STEPS)}, teacher())
            if k == HINT_STEPS - 1:  # so far the guided layer and its regressor alone have learned
                np.testing.assert_array_equal(state.params["student"][1]["kernel"], init(50)[1]["kernel"])
        found[hint_steps] = accuracy(state.params["student"])
    assert found[HINT_STEPS] > found[0] + 0.015, found


HINT_STEPS = 100


@pytest.mark.slow
def test_a_chain_of_assistants_hands_the_knowledge_down():
    """Falling sizes: the last student has seen neither a label nor the first teacher, and still knows the digits."""

    def learn(width, above):
        return fit(5, labels=0 * Y, targets=soft(above, temperature=2.0), temperature=2.0, widths=(64, width, 10))

    assistant, student = distill.teaching_chain(learn, [16, 10], teacher())
    assert assistant[0]["kernel"].shape[-1] == 16 and student[0]["kernel"].shape[-1] == 10
    assert accuracy(student) > 0.88 and accuracy(teacher()) >= accuracy(student)


@pytest.mark.slow
def test_early_stopped_distillation_frees_the_student_of_a_bad_teacher():
    targets = soft(misled()[0])
    kept, stopped = (accuracy(fit(2, targets=targets, alpha=distill.early_stopped(0.9, stop))) for stop in (10**6, 40))
    assert stopped > kept + 0.2 and stopped > accuracy(fit(2)) - 0.01


@pytest.mark.slow
def test_early_stopped_teachers_teach_better():
    """Cho and Hariharan: the teacher that was stopped before it learned the noise."""
    late, early = (accuracy(fit(2, targets=soft(params))) for params in misled())
    assert early > late + 0.15


@pytest.mark.slow
def test_born_again_generations_and_their_ensemble():
    """Under noisy labels each of the later networks beats the first, and all together beat their mean."""

    def generation(k, above):
        targets, alpha = (None, 0.0) if above is None else (soft(above), 0.7)
        return fit(20 + k, labels=noisy_labels(0), targets=targets, alpha=alpha, steps=60)

    students = distill.teaching_chain(generation, range(3))
    accuracies = [accuracy(params) for params in students]
    together = distill.ensemble_targets(jnp.stack([apply(params, X_TEST) for params in students]))
    together = float((np.asarray(together).argmax(-1) == Y_TEST).mean())
    assert min(accuracies[1:]) > accuracies[0] + 0.005 and together > np.mean(accuracies) + 0.005


def half(x, seed):
    """Each image with five of its eight rows, or columns, wiped out."""
    images = x.reshape(-1, 8, 8).copy()
    for image, side in zip(images, np.random.default_rng(seed).integers(0, 4, len(images)), strict=True):
        (image if side < 2 else image.T)[slice(0, 5) if side % 2 else slice(3, 8)] = 0
    return images.reshape(-1, 64)


@pytest.mark.slow
def test_refined_labels_say_what_is_in_the_crop():
    """A student of what the teacher sees in each crop knows its doubts better than one of the whole image's label."""
    sees_halves = fit(6, x=half(IMAGES[400:800], 9), labels=LABELS[400:800])
    crops = np.stack([half(X[:100], seed) for seed in range(4)], axis=1)
    one = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], sees_halves) for i in range(COPIES)]
    refined = [distill.refined_labels(lambda x, p=p: apply(p, x)[0], crops).reshape(ROWS, 10) for p in one]
    whole = jnp.repeat(soft(sees_halves, X[:100]), 4, axis=1)
    hard = jnp.repeat(jnp.broadcast_to(jax.nn.one_hot(Y[:100], 10), (COPIES, 100, 10)), 4, axis=1)
    surprise = []
    for targets in (jnp.stack(refined), whole, hard):
        params = fit(7, x=crops.reshape(ROWS, 64), labels=0 * Y, targets=targets)
        logits = apply(params, half(X_TEST, 77))
        surprise.append(float(distill.hard_label_loss(logits, np.broadcast_to(Y_TEST, logits.shape[:-1])).mean()))
    assert surprise[0] < 0.93 * min(surprise[1:]), surprise


NETWORKS = 3


def mutual(alternating):
    def loss_fn(params, batch, context):
        logits = [apply(p, batch["x"]) for p in params]
        losses = distill.mutual_learning_loss(logits, batch["labels"], weight=batch["weight"])
        chosen = losses[context.step % NETWORKS] if alternating else losses.sum(0)
        return COPIES * chosen.mean(), {}, context.extras

    return loss_fn


@pytest.mark.slow
def test_mutual_learning_simultaneous_and_alternating():
    """Peers keep each other from learning wrong labels by heart. Without each other both forms are the same training:
    one that takes turns moves nobody out of turn."""
    results = {}
    for alternating in (False, True):
        tx = distill.alternating(TX) if alternating else TX
        learn = train.make_step(mutual(alternating), tx)
        for weight in (0.0, 3.0):
            state = train.TrainState.create([init(30 + i) for i in range(NETWORKS)], tx, key=jax.random.key(0))
            batch = {"x": X, "labels": noisy_labels(0), "weight": np.float32(weight)}
            state = run(learn, state, batch, 80 * (NETWORKS if alternating else 1))
            results[alternating, weight] = state.params
    for alternating in (False, True):
        alone, together = ([accuracy(p) for p in results[alternating, weight]] for weight in (0.0, 3.0))
        assert min(together) > max(alone) and np.mean(together) > np.mean(alone) + 0.02
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results[False, 0.0], results[True, 0.0])


@pytest.mark.slow
def test_alternating_leaves_the_others_alone():
    """With momentum and weight decay, on a dict of networks: three updates, each of one network, and all of them."""
    tx = distill.alternating(optax.adamw(0.1, weight_decay=0.1))
    params = {name: {"w": jnp.ones(2)} for name in "abc"}
    state, history = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        history.append([name for name in "abc" if updates[name]["w"].any()])
    assert history == [["a"], ["b"], ["c"]] * 2
    alone, own = {"w": jnp.ones(2)}, optax.adamw(0.1, weight_decay=0.1)
    own_state = own.init(alone)
    for _ in range(2):
        updates, own_state = own.update(jax.tree.map(jnp.ones_like, alone), own_state, alone)
        alone = optax.apply_updates(alone, updates)
    for name in "abc":
        np.testing.assert_allclose(params[name]["w"], alone["w"], rtol=1e-6)


@pytest.mark.slow
def test_an_average_of_its_own_past_teaches_the_student():
    """Under noisy labels the self-taught student is far better than the one left to the labels, or than its average."""

    def self_taught(params, batch, context):
        logits, slow = apply(params, batch["x"]), apply(context.extras, batch["x"])
        losses = distill.distillation_loss(logits, slow, batch["labels"], alpha=batch["alpha"], temperature=1.0)
        moved = distill.moving_average(context.extras, jax.lax.stop_gradient(params), 0.95, context.step)
        return COPIES * losses.mean(), {}, moved

    learn, found = train.make_step(self_taught, TX), {}
    for alpha in (0.0, 0.9):
        state = train.TrainState.create(init(40), TX, extras=init(40), key=jax.random.key(0))
        batch = {"x": X, "labels": noisy_labels(0), "alpha": np.float32(alpha)}
        state = run(learn, state, batch, 150)
        found[alpha] = accuracy(state.params), accuracy(state.extras)
    assert min(found[0.9]) > max(found[0.0]) + 0.05
    assert found[0.0][1] > found[0.0][0]


@pytest.mark.slow
def test_schedules_follow_the_steps_own_count():
    """Read from `context.step` in one jitted step, they give what numbers handed in by the host give; also resumed."""
    weight, heat = distill.warmed_up(0.9, 20), distill.annealed_temperature(4.0, 1.0, 30)
    targets = soft(teacher(), temperature=2.0)

    def scheduled(params, batch, context):
        given = {"alpha": weight(context.step), "temperature": heat(context.step), "where": np.ones(ROWS, bool)}
        return loss_fn(params, batch | given, context)

    learn = train.make_step(scheduled, TX)
    inside = train.TrainState.create(init(8), TX, key=jax.random.key(0))
    outside = train.TrainState.create(init(8), TX, key=jax.random.key(0))
    batch = {"x": X, "labels": np.broadcast_to(Y, (COPIES, ROWS)), "targets": targets}
    for k in range(40):
        inside, _ = learn(inside, batch)
        given = {"alpha": np.float32(weight(k)), "temperature": np.float32(heat(k)), "where": np.ones(ROWS, bool)}
        outside, _ = step(outside, batch | given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), inside.params, outside.params)
