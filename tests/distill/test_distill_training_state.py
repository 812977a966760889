"""What learns beside the student: projectors in the training state, optimized, sharded, saved, and left behind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jaxcompress import distill, pack, prune, train

PROJECTOR = distill.dense_projector(8, 32)
CONTRAST = distill.dense_projector(8, 32, bias=False)
HEADS = distill.contrastive_heads(8, 32, 16)
RULES = [("student/w1$", P(None, "model")), ("projector/kernel$", P(None, "model")), ("contrast/kernel$", P("model"))]
TX = optax.adam(1e-2)


def network(params, x):
    hidden = jnp.tanh(x @ params["w1"])
    return hidden @ params["w2"], hidden


def weights(inputs, hidden, classes, seed):
    rng = np.random.default_rng(seed)
    return {
        "w1": jnp.asarray(rng.normal(size=(inputs, hidden)) / np.sqrt(inputs), jnp.float32),
        "w2": jnp.asarray(rng.normal(size=(hidden, classes)) / np.sqrt(hidden), jnp.float32),
    }


def loss_fn(params, batch, context):
    logits, hidden = network(params["student"], batch["x"])
    teacher_logits, hint = network(context.frozen, batch["x"])
    hints = distill.hint_loss(PROJECTOR.apply(params["projector"], hidden), hint).mean()
    contrast = distill.in_batch_contrastive_loss(CONTRAST.apply(params["contrast"], hidden), hint).mean()
    soft = distill.soft_target_loss(logits, teacher_logits, temperature=2.0).mean()
    return hints + 0.1 * contrast + soft, {"hint": hints}, context.extras


def create():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"student": weights(12, 8, 4, 0), "projector": PROJECTOR.init(keys[0]), "contrast": CONTRAST.init(keys[1])}
    return train.TrainState.create(params, TX, key=jax.random.key(1))


def run(step, state, teacher, steps):
    hints = []
    for k in range(steps):
        x = np.random.default_rng(k).normal(size=(32, 12)).astype(np.float32)
        state, metrics = step(state, {"x": x}, teacher)
        hints.append(float(metrics["hint"]))
    return state, hints


def test_projectors_train_shard_and_save_with_the_student_and_stay_behind(tmp_path):
    """On one device and on eight the same training; the checkpoint has the projectors, the exported student not."""
    step, teacher = train.make_step(loss_fn, TX), weights(12, 32, 4, 1)
    alone, hints = run(step, create(), teacher, 60)
    assert hints[-1] < 0.7 * hints[0]
    for name, params in create().params.items():
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, alone.params[name])
        assert min(jax.tree.leaves(moved)) > 1e-3, name  # every part of every projector learns

    mesh = train.make_mesh(data=4, model=2)
    state = train.shard(create(), mesh, RULES)
    state, _ = run(step, state, train.shard(teacher, mesh), 3)
    for tree in (state.params, state.opt_state[0].mu):
        assert tree["projector"]["kernel"].sharding.spec == P(None, "model")
        assert tree["contrast"]["kernel"].sharding.spec == P("model")
        assert tree["projector"]["kernel"].addressable_shards[0].data.shape == (8, 16)
    few, _ = run(step, create(), teacher, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state.params, few.params)

    with train.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(train.shard(create(), mesh, RULES))
    jax.tree.map(np.testing.assert_array_equal, (restored.params, restored.opt_state), (state.params, state.opt_state))
    assert restored.params["projector"]["kernel"].sharding == state.params["projector"]["kernel"].sharding

    pack.save(tmp_path / "student.jxc", state.params["student"])
    exported = pack.load(tmp_path / "student.jxc")
    assert set(exported) == {"w1", "w2"}
    x = np.ones((2, 12), np.float32)
    np.testing.assert_allclose(network(exported, x)[0], network(state.params["student"], x)[0], rtol=1e-5, atol=1e-6)


def test_a_contrast_memory_and_an_averaged_teacher_stand_in_the_extras():
    """State that learns nothing by gradient goes from step to step, and is saved and sharded, with the extras."""

    def with_state(params, batch, context):
        logits, hidden = network(params["student"], batch["x"])
        _, slow_hidden = network(context.extras["slow"], batch["x"])
        pair = HEADS.apply(params["heads"], (hidden, jnp.tile(slow_hidden, 4)))
        losses, memory = distill.contrastive_loss(*pair, context.extras["memory"], batch["index"], batch["others"])
        slow = distill.moving_average(context.extras["slow"], jax.lax.stop_gradient(params["student"]), 0.9)
        hard = distill.hard_label_loss(logits, batch["label"])
        return losses.mean() + hard.mean(), {}, {"slow": slow, "memory": memory}

    student = weights(12, 8, 4, 0)
    params = {"student": student, "heads": HEADS.init(jax.random.key(2))}
    extras = {"slow": student, "memory": distill.contrast_memory(jax.random.key(3), 64, 16)}
    state = train.TrainState.create(params, TX, key=jax.random.key(0), extras=extras)
    step, rng, past = train.make_step(with_state, TX), np.random.default_rng(0), [student["w1"]]
    for _ in range(3):
        index = rng.permutation(64)[:16]
        others = np.concatenate([index[:, None], rng.integers(0, 64, (16, 5))], axis=1)
        x = rng.normal(size=(16, 12)).astype(np.float32)
        past.append(np.asarray(state.params["student"]["w1"]))
        state, _ = step(state, {"x": x, "label": index % 4, "index": index, "others": others})
    slow = past[0]
    for w in past[1:]:
        slow = 0.9 * slow + 0.1 * w
    np.testing.assert_allclose(state.extras["slow"]["w1"], slow, rtol=1e-5, atol=1e-6)
    memory = state.extras["memory"]
    assert np.isfinite(memory.student_log_constant) and int(state.step) == 3
    np.testing.assert_allclose(np.linalg.norm(memory.student[index], axis=1), 1, rtol=1e-5)


PEERS = {"a": {"kernel": jnp.ones((8, 16))}, "b": {"kernel": jnp.ones((8, 16))}}


def test_the_optimizer_of_networks_in_turn_lies_as_they_do():
    """Each network's moments are found by its own path, not by what all networks call their weight."""
    state = train.TrainState.create(PEERS, distill.alternating(TX), key=jax.random.key(0))
    mesh = train.make_mesh(data=4, model=2)
    placed = train.shardings(state, mesh, [("^a/kernel$", P(None, "model")), ("b/kernel$", P("data"))])
    for k, (name, spec) in enumerate({"a": P(None, "model"), "b": P("data")}.items()):
        moments = placed.opt_state.networks[k][0]
        assert placed.params[name]["kernel"].spec == moments.mu[name]["kernel"].spec == spec
        assert moments.count.spec == P()


def test_networks_in_turn_are_pruned_each_on_its_own():
    grads = jax.tree.map(jnp.ones_like, PEERS)
    tx = distill.alternating(optax.chain(optax.sgd(0.1), prune.sparsify({"kernel$": 0.5}, prune.one_shot())))
    params, state = PEERS, tx.init(PEERS)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    kept = prune.masks(state)
    assert kept.keys() == {"a/kernel", "b/kernel"}
    for name, mask in kept.items():
        assert prune.sparsity(params)[name] == 0.5 == 1 - float(mask.mean())


def test_a_weight_that_comes_back_has_no_moments_of_networks_in_turn():
    rules = {name: 0.5 for name in ("a/kernel$", "b/kernel$")}
    tx = prune.around(distill.alternating(TX), prune.rewire(rules, end=100, every=2, key=jax.random.key(0)))
    params, state, came_back = PEERS, tx.init(PEERS), 0
    update = jax.jit(tx.update)
    for k in range(3):
        before = prune.masks(state)
        grads = jax.tree.map(lambda x, k=k: jax.random.normal(jax.random.key(k), x.shape), PEERS)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for i, name in enumerate("ab"):
            back = prune.masks(state)[f"{name}/kernel"] & ~before[f"{name}/kernel"]
            moments = state.inner.networks[i][0]
            assert not moments.mu[name]["kernel"][back].any() and not moments.nu[name]["kernel"][back].any()
            came_back += int(back.sum())
    assert came_back > 0
