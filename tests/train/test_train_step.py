import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from train_toys import (
    CLASSES,
    SIZE,
    assert_close,
    batches,
    create,
    dataset,
    flat,
    loss_fn,
    teacher_variables,
)

from jaxcompress import quantize, train
from jaxcompress.arrays import Quantized, compressed

MODEL_RULES = [("Dense_0/kernel", P(None, "model")), ("Dense_1/kernel", P("model", None)), ("Conv", P("model"))]
TEACHER_RULES = [("Dense_0/kernel", P(None, "model"))]
SGD = optax.sgd(0.1, momentum=0.9)  # linear in the gradient: it does not amplify rounding as adam does


def run(state, frozen, loss_fn=loss_fn):
    step, data, seen = train.make_step(loss_fn, SGD), batches(), []
    for _ in range(4):
        state, metrics = step(state, next(data), frozen)
        seen.append(jax.device_get(metrics))
    return state, seen


@pytest.fixture(scope="module")
def alone():
    return run(create(SGD), teacher_variables(jnp.float32))


@pytest.mark.parametrize(
    ("axes", "rules", "teacher_rules"),
    [
        pytest.param({"data": 8}, [], [], marks=pytest.mark.slow),
        ({"data": 4, "model": 2}, MODEL_RULES, TEACHER_RULES),
    ],
    ids=["data", "data x model"],
)
def test_eight_devices_give_what_one_gives(axes, rules, teacher_rules, alone):
    """Batch statistics and dropout included; the state stays where it was put, and one trace serves all steps.

    The teacher is float32 here: summed over two chips, bfloat16 products round otherwise than on one.
    """
    mesh, traces = train.make_mesh(**axes), Counter()
    state = train.shard(create(SGD), mesh, rules)
    assert state.params["Dense_0"]["kernel"].sharding.spec == (P(None, "model") if rules else P())
    places = jax.tree.map(lambda x: x.sharding, state)

    def counted(*args):
        traces["loss"] += 1
        return loss_fn(*args)

    state, metrics = run(state, train.shard(teacher_variables(jnp.float32), mesh, teacher_rules), counted)
    assert_close(state, alone[0])
    assert_close(metrics, alone[1])
    assert jax.tree.map(lambda x: x.sharding, state) == places
    assert traces["loss"] == 1
    assert not np.allclose(flat(state.extras)["['batch_stats']['BatchNorm_0']['mean']"], 0)


def test_dropout_masks_differ_between_devices_and_steps():
    def masks(params, batch, context):
        kept = jax.random.bernoulli(context.key, 0.5, batch.shape)
        return params.sum(), {}, {"kept": kept}

    mesh, tx = train.make_mesh(), optax.sgd(0.1)
    state = train.TrainState.create(jnp.ones(3), tx, extras={"kept": jnp.zeros((8, 64), bool)}, key=jax.random.key(0))
    state = train.shard(state, mesh, [("kept", P("data"))])
    step, seen = train.make_step(masks, tx), set()
    for _ in range(3):
        state, _ = step(state, np.zeros((8, 64)))
        assert len(state.extras["kept"].sharding.device_set) == 8
        seen |= {np.asarray(shard.data).tobytes() for shard in state.extras["kept"].addressable_shards}
    assert len(seen) == 24


def test_the_state_is_donated_and_nothing_else():
    tx = optax.adam(1e-3)
    params = {"w": jnp.ones((3, 2))}
    key, teacher = jax.random.key(0), {"w": jnp.ones((3, 2))}
    state = train.TrainState.create(params, tx, key=key)
    batch = jnp.ones((4, 3))

    def loss(params, batch, context):
        return ((batch @ params["w"] - batch @ context.frozen["w"] * 2) ** 2).mean(), {}, context.extras

    new, _ = train.make_step(loss, tx)(state, batch, teacher)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves((new, params, key, teacher, batch)))


def ascend(params, batch, context):
    return -params, {}, context.extras


def test_weakly_typed_extras_do_not_compile_the_step_twice():
    tx, traces = optax.sgd(0.1), Counter()

    def loss(params, batch, context):
        traces["loss"] += 1
        return params, {}, {"was weak": jnp.float32(1), "is weak": jnp.asarray(1.0), "python": 2}

    extras = {"was weak": jnp.asarray(0.0), "is weak": jnp.float32(0), "python": 0}
    assert extras["was weak"].weak_type and not extras["is weak"].weak_type
    state, step = (
        train.TrainState.create(jnp.ones(()), tx, extras=extras, key=jax.random.key(0)),
        train.make_step(loss, tx),
    )
    for _ in range(3):
        state, _ = step(state, None)
    assert traces["loss"] == 1
    assert {name: float(x) for name, x in state.extras.items()} == {"was weak": 1, "is weak": 1, "python": 2}


def _flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_the_teacher_costs_its_forward_pass():
    """The FLOPs of the step under a teacher, less those of the step without one, are those of the teacher's forward."""
    tx, batch, width = optax.sgd(0.1), jnp.ones((64, 32)), 256
    teacher = [jnp.ones((32, width), jnp.bfloat16), jnp.ones((width, width), jnp.bfloat16), jnp.ones((width, 5))]

    def forward(teacher, batch):
        for w in teacher:
            batch = jnp.tanh(batch.astype(w.dtype) @ w)
        return batch

    def loss(params, batch, context):
        target = 1.0 if context.frozen is None else forward(context.frozen, batch)
        return jnp.mean((batch @ params - target) ** 2), {}, context.extras

    state, step = train.TrainState.create(jnp.ones((32, 5)), tx, key=jax.random.key(0)), train.make_step(loss, tx)
    under, alone = (step.lower(state, batch, frozen).compile().cost_analysis()["flops"] for frozen in (teacher, None))
    assert (under - alone) / _flops(forward, teacher, batch) == pytest.approx(1, abs=0.01)


def test_the_teacher_keeps_its_dtype_and_its_place():
    mesh, tx = train.make_mesh(data=4, model=2), optax.sgd(0.1)
    state, teacher = train.shard(create(tx), mesh), train.shard(teacher_variables(), mesh, TEACHER_RULES)
    batch = train.shard_batch(next(batches()), mesh)
    text = train.make_step(loss_fn, tx).lower(state, batch, teacher).compile().as_text()
    entry = text[text.index("entry_computation_layout") :].split("\n")[0]
    assert f"bf16[{SIZE * SIZE},32]" in entry  # half of the 64 columns, in bfloat16, goes in
    assert "bf16" not in entry.split("->")[1]  # and does not come out


def test_grad_norm_is_the_gradients_norm_in_float32():
    tx = optax.sgd(0.0)
    params = {"a": jnp.full(1000, 3.0, jnp.bfloat16), "b": jnp.full(4, 2.0)}
    state = train.TrainState.create(params, tx, key=jax.random.key(0))

    def loss(params, batch, context):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) / 2 for x in jax.tree.leaves(params)), {}, context.extras

    assert set(train.make_step(loss, tx)(state, None)[1]) == {"loss"}
    state = train.TrainState.create(params, tx, key=jax.random.key(0))
    _, metrics = train.make_step(loss, tx, grad_norm=True)(state, None)
    assert float(metrics["grad_norm"]) == pytest.approx(np.sqrt(9 * 1000 + 4 * 4), rel=1e-6)


def test_integers_of_a_compressed_weight_stay_and_its_scales_train():
    codes = np.random.default_rng(0).integers(-127, 128, size=(6, 4)).astype(np.int8)
    params = {"kernel": Quantized.from_codes(jnp.asarray(codes), jnp.full((1, 4), 0.01)), "bias": jnp.zeros(4)}
    tx = optax.adam(1e-2)
    x, y = jnp.ones((8, 6)), jnp.ones((8, 4))

    def apply(params, x):
        return x @ params["kernel"] + params["bias"]

    def loss(params, batch, context):
        return jnp.mean((compressed(apply)(params, x) - y) ** 2), {}, context.extras

    mesh = train.make_mesh(data=4, model=2)
    state = train.shard(
        train.TrainState.create(params, tx, key=jax.random.key(0)), mesh, [("kernel", P(None, "model"))]
    )
    step, losses = train.make_step(loss, tx), []
    for _ in range(20):
        state, metrics = step(state, None)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 2
    np.testing.assert_array_equal(state.params["kernel"].values, codes)
    assert not np.allclose(state.params["kernel"].scale, 0.01)


@pytest.mark.parametrize("scheme", [quantize.Floats(), quantize.MX("int8")], ids=["values", "scales"])
def test_eight_bit_floats_of_a_compressed_weight_stay(scheme):
    """Adam's moments underflow in 8 bits, and what it divided by them was NaN."""
    weight = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    params = quantize.convert({"kernel": weight, "bias": jnp.zeros(4)}, {"kernel": scheme})
    tx = optax.adam(1e-4)

    def loss(params, batch, context):
        return jnp.mean(compressed(lambda p: jnp.ones((8, 32)) @ p["kernel"] + p["bias"])(params) ** 2), {}, {}

    before = flat(params)
    state, step = train.TrainState.create(params, tx, key=jax.random.key(0)), train.make_step(loss, tx)
    for _ in range(20):
        state, metrics = step(state, None)
    assert np.isfinite(metrics["loss"])
    after = flat(state.params)
    for name in before:
        assert np.array_equal(before[name], after[name]) == (before[name].dtype.itemsize == 1)


class NnxStudent(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(SIZE * SIZE, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x.reshape(len(x), -1))))))


@pytest.mark.slow
def test_an_nnx_student():
    graph, params, rest = nnx.split(NnxStudent(nnx.Rngs(0)), nnx.Param, ...)
    tx = optax.adam(1e-2)
    state = train.TrainState.create(nnx.to_pure_dict(params), tx, extras=nnx.to_pure_dict(rest), key=jax.random.key(1))

    def loss(params, batch, context):
        model = nnx.merge(graph, *(nnx.State(tree) for tree in (params, context.extras)))
        logits = model(batch["image"])
        value = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return value, {}, nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])

    state = train.shard(state, train.make_mesh(data=4, devices=jax.devices()[:4]))
    before = jax.device_get(flat(state.extras))
    step, data, losses = train.make_step(loss, tx), batches(), []
    for _ in range(30):
        state, metrics = step(state, next(data))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    moved = {name for name, x in flat(state.extras).items() if not np.array_equal(x, before[name])}
    assert any("mean" in name for name in moved) and any("count" in name for name in moved)


def test_a_mean_teacher_and_a_regressor_need_nothing_of_the_step():
    """An exponential moving average as the teacher, a hint's regressor in the same tree, and a scheduled weight."""
    tx, decay = optax.sgd(0.05), 0.9
    params = {"student": {"w": jnp.ones((3, 2))}, "regressor": {"w": jnp.ones((2, 5))}}

    def loss(params, batch, context):
        hidden, target = batch @ params["student"]["w"], batch @ context.extras["ema"]["w"]
        weight = optax.linear_schedule(1.0, 0.0, 3)(context.step)
        hint = jnp.mean((hidden @ params["regressor"]["w"] - context.frozen["hint"]) ** 2)
        ema = optax.incremental_update(params["student"], context.extras["ema"], 1 - decay)
        return jnp.mean((hidden - target) ** 2) + weight * hint, {"weight": weight}, {"ema": ema}

    state = train.TrainState.create(params, tx, extras={"ema": params["student"]}, key=jax.random.key(0))
    step, expected, weights = train.make_step(loss, tx), np.ones((3, 2)), []
    for _ in range(4):
        expected = decay * expected + (1 - decay) * np.asarray(state.params["student"]["w"])
        state, metrics = step(state, jnp.eye(3), {"hint": jnp.zeros(5)})
        weights.append(float(metrics["weight"]))
    np.testing.assert_allclose(state.extras["ema"]["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(weights, [1, 2 / 3, 1 / 3, 0], atol=1e-6)


def test_two_networks_teach_each_other():
    """Mutual learning, alternating: each one's parameters are the other's frozen ones, and survive its donation."""
    tx = optax.sgd(0.2)

    def loss(params, batch, context):
        return jnp.mean((batch @ (params - context.frozen)) ** 2), {}, context.extras

    one, two = (train.TrainState.create(jnp.full(3, x), tx, key=jax.random.key(0)) for x in (0.0, 1.0))
    step = train.make_step(loss, tx)
    for _ in range(30):
        one, _ = step(one, jnp.eye(3), two.params)
        two, _ = step(two, jnp.eye(3), one.params)
    np.testing.assert_allclose(one.params, two.params, atol=1e-3)
    assert 0 < float(one.params[0]) < 1


def test_a_constraint_inside_the_model_finds_the_mesh():
    mesh, tx = train.make_mesh(data=4, model=2), optax.sgd(0.1)

    def loss(params, batch, context):
        hidden = jax.lax.with_sharding_constraint(batch @ params, P("data", "model"))
        return jnp.mean(hidden**2), {}, context.extras

    state = train.shard(train.TrainState.create(jnp.ones((4, 2)), tx, key=jax.random.key(0)), mesh)
    place = state.params.sharding
    state, metrics = train.make_step(loss, tx)(state, np.ones((8, 4), np.float32))
    assert float(metrics["loss"]) == pytest.approx(16)
    assert state.params.sharding == place  # its gradient came divided over `model`


def test_a_mesh_with_explicit_axes_serves_too():
    mesh, tx = jax.make_mesh((4, 2), ("data", "model")), optax.adam(1e-2)
    assert set(mesh.axis_types) == {AxisType.Explicit}

    def loss(params, batch, context):
        return jnp.mean((batch @ params) ** 2), {}, context.extras

    alone = train.TrainState.create(jnp.ones((4, 2)), tx, key=jax.random.key(0))
    spread = train.shard(alone, mesh, [("params|mu|nu", P(None, "model"))])
    place, step = spread.params.sharding, train.make_step(loss, tx)
    for _ in range(3):
        spread, _ = step(spread, np.ones((8, 4), np.float32))
        alone, _ = step(alone, np.ones((8, 4), np.float32))
        assert spread.params.sharding == spread.opt_state[0].mu.sharding == place
    assert_close(spread, alone)


def test_a_state_can_be_made_in_its_place():
    mesh, tx = train.make_mesh(data=4, model=2), optax.MultiSteps(optax.inject_hyperparams(optax.adam)(1e-3), 2)

    def make():
        key = jax.random.key(0)
        return train.TrainState.create({"kernel": jax.random.normal(key, (4, 6))}, tx, key=key)

    def loss(params, batch, context):
        return jnp.mean((batch @ params["kernel"]) ** 2), {}, context.extras

    places = train.shardings(jax.eval_shape(make), mesh, [("kernel", P("model"))])
    state, step = jax.jit(make, out_shardings=places)(), train.make_step(loss, tx)
    np.testing.assert_array_equal(state.params["kernel"], make().params["kernel"])
    for _ in range(3):
        state, _ = step(state, np.ones((8, 4), np.float32))
        assert jax.tree.map(lambda x: x.sharding, state) == places
    moments = state.opt_state.inner_opt_state.inner_state[0].mu, state.opt_state.acc_grads
    assert all(tree["kernel"].sharding.spec == P("model") for tree in moments)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda p, c: p.sum(), "must return \\(loss, metrics, extras\\).*float32\\[\\]"),
        (lambda p, c: (p.sum(), {}), "must return .* got a tuple of 2"),
        (lambda p, c: (p, {}, c.extras), "loss must be a scalar, got float32\\[3\\]"),
        (lambda p, c: (p.sum(), {"each": p}, c.extras), "each must be a scalar, got float32\\[3\\]"),
        (lambda p, c: (p.sum(), {"loss": p.sum()}, c.extras), "itself reports \\['loss'\\]"),
        (lambda p, c: (p.sum(), {}, {}), "extras must keep its leaves .* stats was float32\\[2\\] and is now absent"),
        (lambda p, c: (p.sum(), {}, {"stats": p}), "stats was float32\\[2\\] and is now float32\\[3\\]"),
        (lambda p, c: (p.sum(), {}, {"stats": jnp.ones(2, jnp.bfloat16)}), "is now bfloat16\\[2\\]"),
    ],
)
def test_results_that_no_step_can_use(result, message):
    tx = optax.sgd(0.1)
    state = train.TrainState.create(jnp.ones(3), tx, extras={"stats": jnp.ones(2)}, key=jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        train.make_step(lambda p, b, c: result(p, c), tx)(state, None)
    assert not state.params.is_deleted()


def test_states_that_no_step_can_use():
    tx = optax.sgd(0.1)
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        train.TrainState.create(jnp.ones(3), tx, key=jnp.zeros(2, jnp.uint32))
    with pytest.raises(TypeError, match="one typed PRNG key"):
        train.TrainState.create(jnp.ones(3), tx, key=jax.random.split(jax.random.key(0)))
    with pytest.raises(ValueError, match="nothing to train: of the 1 leaves"):
        train.TrainState.create({"w": jnp.arange(3)}, tx, key=jax.random.key(0))


@pytest.mark.parametrize("other", [optax.sgd(0.1), optax.adam(0.1), optax.adam(optax.constant_schedule(0.1))])
def test_a_state_of_another_optimizer_is_refused(other):
    for own in (optax.sgd(0.1, momentum=0.9), optax.adamw(0.1)):
        with pytest.raises(ValueError, match="the state is of another optimizer than the step"):
            train.make_step(lambda p, b, c: (jnp.sum(p), {}, c.extras), own)(
                train.TrainState.create(jnp.ones(3), other, key=jax.random.key(0)), {}
            )


def test_what_lies_elsewhere_is_refused():
    tx, mesh = optax.sgd(0.1), train.make_mesh()
    step = train.make_step(loss_fn, tx)
    state, placed = create(tx), train.shard(create(tx), mesh)
    with pytest.raises(ValueError, match=r"frozen/Dense_0/bias does not lie on the state's mesh: .*shard"):
        step(placed, next(batches()), teacher_variables())
    with pytest.raises(ValueError, match="lies on a mesh, but the state does not"):
        step(state, next(batches()), train.shard(teacher_variables(), mesh))
    with pytest.raises(ValueError, match=r"frozen/a/.* is an array of the state, .*: hand in a copy"):
        step(state, next(batches()), {"a": state.params})  # its own past as the teacher
    mixed = dataclasses.replace(placed, key=jax.random.key(0))
    with pytest.raises(ValueError, match="key does not lie on the state's mesh"):
        step(mixed, next(batches()))
    with pytest.raises(ValueError, match="image has 12 rows, which 8 devices along 'data' cannot share evenly"):
        step(placed, dataset(12)[0], train.shard(teacher_variables(), mesh))
    with pytest.raises(ValueError, match=r"names \['rows'\], but the mesh has the axes \('data',\)"):
        train.make_step(loss_fn, tx, batch_axis="rows")(placed, next(batches()), None)
