"""What is cut goes on: packed, sharded, in rounds with a teacher, and to a time that is measured."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress import compressed, dense, distill, pack, quantize
from jaxcompress.prune import channels

RNG = np.random.default_rng(4)
X = jnp.asarray(RNG.normal(size=(32, 6)), jnp.float32)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)
    for name, shape in {"a": (6, 16), "b": (16, 24), "c": (24, 4)}.items()
}


def net(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


def test_a_packed_plan_and_its_parameters_run_elsewhere(tmp_path):
    """From the file alone: the plan as metadata, the smaller parameters quantized, and no whole parameters."""
    groups = channels.groups(net, PARAMS, X)
    plan = channels.plan(groups, channels.norm(groups, PARAMS), 0.5)
    small = quantize.convert(plan.apply(PARAMS), {"[ab]$": quantize.Affine(bits=8)})
    pack.save(tmp_path / "small.jcp", small, metadata={"plan": plan.to_json()})
    loaded = jax.tree.map(jnp.asarray, pack.load(tmp_path / "small.jcp"))
    read = channels.Plan.from_json(pack.load_metadata(tmp_path / "small.jcp")["plan"])
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in read.shapes.items()}
    out = compressed(channels.shrink(net, shapes, read))(loaded, X)
    wanted = net(plan.mask(PARAMS), X)
    np.testing.assert_allclose(out, wanted, atol=0.02 * float(jnp.abs(wanted).max()))
    assert float(jnp.abs(out - wanted).max()) > 0  # it is quantized


def test_the_shapes_before_from_the_smaller_tree():
    groups = channels.groups(net, PARAMS, X)
    plan = channels.plan(groups, channels.norm(groups, PARAMS), 0.5)
    whole = plan.undone(plan.apply(PARAMS))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), whole) == jax.tree.map(lambda x: (x.shape, x.dtype), PARAMS)
    with pytest.raises(ValueError, match=r"want 'a' of shape \(6, 8\), as plan.apply leaves it; it is \(6, 16\)"):
        plan.undone(PARAMS)


def test_sharded_parameters_stay_sharded_and_train_as_on_one_device():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = {"a": jax.P(None, "model"), "b": jax.P("model", None), "c": jax.P()}
    put = {k: jax.device_put(x, jax.NamedSharding(mesh, spec[k])) for k, x in PARAMS.items()}
    groups = channels.groups(net, PARAMS, X)
    plan = channels.plan(groups, channels.norm(groups, PARAMS), 0.5)
    cut = plan.apply(put)
    assert all(cut[k].sharding.is_equivalent_to(put[k].sharding, 2) for k in cut)
    small = channels.shrink(net, PARAMS, plan)

    @jax.jit
    def step(p, x):
        return jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(lambda p: (small(p, x) ** 2).mean())(p))

    images = jax.device_put(X, jax.NamedSharding(mesh, jax.P("data")))
    one, many = step(plan.apply(PARAMS), X), step(cut, images)
    for name in one:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5, atol=1e-6)
        assert len(many[name].sharding.device_set) == 8


@pytest.mark.slow
def test_rounds_of_cutting_and_distilling_reach_the_size_and_stay_near_the_teacher():
    """Half the units in three rounds, each from the norms that training left, by the whole model's soft targets."""
    teacher = net(PARAMS, X)

    def apart(p, fn):
        return distill.soft_target_loss(fn(p, X), teacher, temperature=2.0).mean()

    def tuned(fn, params, steps=150):
        tx = optax.adam(3e-3)

        def step(carry, _):
            p, s = carry
            updates, s = tx.update(jax.grad(apart)(p, fn), s)
            return (optax.apply_updates(p, updates), s), None

        return jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps)[0])((params, tx.init(params)))[0]

    fn, params = net, PARAMS
    for ratio in (0.25, 1 / 3, 0.25):  # 16 units: 12, 8, 6
        groups = channels.groups(fn, params, X)
        plan = channels.plan(groups, channels.norm(groups, params), ratio)
        fn, cut = channels.shrink(fn, params, plan), plan.apply(params)
        params = tuned(fn, cut)
        assert apart(params, fn) < apart(cut, fn)
    assert {k: x.shape for k, x in params.items()} == {"a": (6, 6), "b": (6, 9), "c": (9, 4)}


@pytest.mark.slow
def test_until_a_measured_time():
    """The plan that is found is fast enough when its time is taken again, with a margin for the clock."""
    wide = {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in (("a", (256, 2048)), ("b", (2048, 256)))}
    x = jnp.asarray(RNG.normal(size=(512, 256)), jnp.float32)

    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    def seconds(run, params):
        run(params, x).block_until_ready()
        taken = []
        for _ in range(9):
            start = time.perf_counter()
            run(params, x).block_until_ready()
            taken.append(time.perf_counter() - start)
        return float(np.median(taken))

    groups = channels.groups(fn, wide, x)
    limit = 0.6 * seconds(jax.jit(fn), wide)

    def fast(plan):
        return seconds(jax.jit(channels.shrink(fn, wide, plan)), plan.apply(wide)) <= limit

    plan = channels.plan(groups, channels.norm(groups, wide), until=fast, round_to=64)
    assert plan.widths["a[1]"][1] < 2048
    assert seconds(jax.jit(channels.shrink(fn, wide, plan)), plan.apply(wide)) <= 1.5 * limit


@pytest.mark.parametrize("how", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
def test_a_cut_function_that_computes_constants_is_quantized(rng, how):
    """`compressed` traces what the function makes of numbers, but the labels are to know them."""
    params = {
        "a": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)

    def fn(params, x):
        h = x @ params["a"]
        return (h / (h.var(0) + 1) / jnp.sqrt(3.0)) @ params["b"]

    groups = channels.groups(fn, params, x)
    plan = channels.plan(groups, channels.norm(groups, params), ratio=0.5)
    small, cut = plan.apply(params), channels.shrink(fn, params, plan)
    codes = quantize.convert(small, {".": quantize.Affine(8)})
    np.testing.assert_allclose(how(compressed(cut))(codes, x), cut(dense(codes), x), rtol=1e-5, atol=1e-5)
