"""`shard_map`: the oracle on eight simulated devices, what a unit owns over shards, and what stays whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels_models import Maker, attend, heads
from jax import P, lax
from test_channels_zoo import check

from jaxcompress.prune import channels

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 5)), jnp.float32)  # [batch, time, channels]
COLUMNS, ROWS = P(None, "model"), P("model")
CASES = {}


def case(build):
    CASES[build.__name__] = build
    return build


def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def over(body, specs, out=None, **more):
    """`body(params, x)` with the batch over `data`, and parameters as the specs say."""
    return jax.shard_map(body, mesh=mesh(), in_specs=(specs, P("data")), out_specs=out or P("data"), **more)


@jax.custom_jvp
def bent(x):
    return jnp.tanh(x)


bent.defjvp(lambda primals, tangents: (bent(primals[0]), 3 * tangents[0] * bent(primals[0])))


@jax.custom_vjp
def scaled(x, w):
    return x @ w


scaled.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (2 * g @ r[1].T, 0.5 * jnp.einsum("btc,btd->cd", r[0], g)))


def _two(m, wide=16):
    return {"a": m(5, wide), "b": m(wide), "c": m(wide, 3)}


@case
def data_parallel():
    p = _two(Maker(), 6)
    return over(lambda p, x: bent(jax.nn.relu(x @ p["a"] + p["b"])) @ p["c"], P()), p


@case
def tensor_parallel():
    """Columns of the first kernel, rows of the second; relu is a custom_jvp of JAX's own, bent one of the user's."""
    p = _two(Maker())

    def body(p, x):
        h = bent(jax.nn.relu(x @ p["a"] + p["b"]))
        return jax.nn.softmax(lax.psum(h @ p["c"], "model"), -1)

    return over(body, {"a": COLUMNS, "b": ROWS, "c": ROWS}), p


@case
def tensor_parallel_unchecked():
    p = _two(Maker())

    def body(p, x):
        return lax.psum(jax.nn.gelu(scaled(x, p["a"]) + p["b"]) @ p["c"], "model")

    return over(body, {"a": COLUMNS, "b": ROWS, "c": ROWS}, check_vma=False), p


@case
def own_vjp():
    p = {"a": Maker()(5, 16), "c": Maker(1)(16, 3)}

    def body(p, x):
        def varies(y, axis):
            return lax.pcast(y, axis, to="varying")

        h = jnp.tanh(scaled(varies(x, "model"), varies(p["a"], "data")))
        return lax.psum(scaled(h, varies(p["c"], "data")), "model")

    return over(body, {"a": COLUMNS, "c": ROWS}), p


@case
def gathered():
    """Sequence and tensor parallel: gathers and scattered sums around the product."""
    p = _two(Maker()) | {"first": Maker(2)(5, 8), "gain": Maker(3)(16)}

    def body(p, x):
        h = jnp.tanh(x @ p["first"])  # [batch, time, a quarter of the channels]
        h = lax.all_gather(h, "model", axis=2, tiled=True)
        parts = lax.all_gather(h[..., :4], "model", axis=0).mean(0)
        h = jnp.concatenate([h, parts], -1) @ p["up"]
        h = lax.psum_scatter(h, "model", scatter_dimension=2, tiled=True) * p["gain"]
        return lax.psum(jax.nn.relu(h) @ p["c"], "model")

    p = {"first": p["first"], "up": Maker(4)(12, 16), "gain": p["gain"], "c": p["c"]}
    return over(body, {"first": COLUMNS, "up": P(), "gain": ROWS, "c": ROWS}), p


@case
def experts_by_all_to_all():
    """Tokens travel between devices that hold an expert each."""
    m = Maker()
    p = {"a": m(5, 8), "up": m(4, 8, 6), "down": m(4, 6, 8), "c": m(8, 3)}

    def body(p, x):
        h = jnp.tanh(x @ p["a"]).reshape(-1, 8)  # [tokens of this shard, channels]
        sent = lax.all_to_all(h, "model", 0, 0, tiled=True)
        sent = jax.nn.relu(sent @ p["up"][0]) @ p["down"][0]
        back = lax.all_to_all(sent, "model", 0, 0, tiled=True)
        turned = lax.all_to_all(lax.all_to_all(h, "model", 1, 0, tiled=True), "model", 0, 1, tiled=True)
        return ((back + turned).reshape(*x.shape[:2], 8)) @ p["c"]

    specs = {"a": P(), "up": ROWS, "down": ROWS, "c": P()}
    fn = jax.shard_map(body, mesh=mesh(), in_specs=(specs, P("data", None)), out_specs=P("data"), check_vma=False)
    return lambda p, x: fn(p, x[:, :4]), p


@case
def ring():
    p = _two(Maker())

    def body(p, x):
        h = jnp.tanh(x @ p["a"] + p["b"])
        h = h + lax.ppermute(h, "model", [(i, (i + 1) % 4) for i in range(4)])
        h = h * lax.pmean(jnp.abs(h), "data") + lax.pmax(lax.stop_gradient(h), "model")
        last = lax.axis_index("model") == 3
        return lax.psum(jnp.where(last, 2.0, 1.0) * h @ p["c"], "model")

    return over(body, {"a": COLUMNS, "b": ROWS, "c": ROWS}), p


@case
def attention_over_heads():
    """Four heads on two devices: two heads on each, which go in pairs; the widths go in all of them."""
    m = Maker()
    p = {"q": m(5, 16), "k": m(5, 16), "v": m(5, 16), "o": m(16, 3)}
    two = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def body(p, x):
        q, k, v = (heads(x @ p[n], 2) for n in "qkv")
        return lax.psum(attend(q, k, v) @ p["o"], "model")

    specs = {"q": COLUMNS, "k": COLUMNS, "v": COLUMNS, "o": ROWS}
    return jax.shard_map(body, mesh=two, in_specs=(specs, P()), out_specs=P()), p


@case
def loops_inside():
    """scan, remat, cond on the device's number, constants that are cut and dropout, all inside."""
    m = Maker()
    p = {"a": m(5, 16), "w": m(3, 4, 4), "v": m(4, 4), "c": m(16, 3)}
    table = np.linspace(0.5, 1.5, 16, dtype=np.float32)

    def body(p, table, x):
        h = jnp.tanh(x @ p["a"]) * table
        step = jax.checkpoint(lambda h, w: (jax.nn.relu(h @ w), None))
        h = lax.scan(step, h, lax.pcast(p["w"], ("data", "model"), to="varying"))[0]
        key = jax.random.fold_in(jax.random.key(0), lax.axis_index("model"))
        h = jnp.where(jax.random.bernoulli(key, 0.7, h.shape), h, 0)
        h = lax.cond(lax.axis_index("data") > 0, lambda h: jnp.sin(h @ p["v"]), lambda h: h @ p["v"], h)
        return lax.psum(h @ p["c"], "model")

    fn = jax.shard_map(
        body,
        mesh=mesh(),
        in_specs=({"a": COLUMNS, "w": P(), "v": P(), "c": ROWS}, ROWS, P("data")),
        out_specs=P("data"),
    )
    return lambda p, x: fn(p, table, x), p


@case
def gradient_inside():
    """The function itself takes a gradient through the shards, as a meta-learner does."""
    p = _two(Maker(), 8)

    def body(p, x):
        return jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]

    fn = over(body, P())
    return lambda p, x: x + jax.grad(lambda x: (fn(p, x) ** 2).sum())(x), p


@case
def one_axis_manual():
    """Only the model's axis is cut by hand; the batch is left to the compiler."""
    p = _two(Maker())

    def body(p, x):
        return lax.psum(jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"], "model")

    specs = ({"a": COLUMNS, "b": ROWS, "c": ROWS}, P())
    return jax.shard_map(body, mesh=mesh(), in_specs=specs, out_specs=P(), axis_names={"model"}), p


@case
def before_and_after():
    """Channels that come out of one shard_map, pass a residual outside, and go into another with other shards."""
    m = Maker()
    p = {"a": m(5, 16), "b": m(16, 16), "c": m(16, 3)}
    up = over(lambda a, x: jnp.tanh(x @ a), COLUMNS, P("data", None, "model"))
    down = jax.shard_map(
        lambda c, h: lax.psum(h @ c, ("data", "model")),
        mesh=mesh(),
        in_specs=(P(("data", "model")), P(None, None, ("data", "model"))),
        out_specs=P(),
    )

    def fn(p, x):
        h = up(p["a"], x)
        return down(p["c"], h + jnp.sin(h @ p["b"]))

    return fn, p


FAST = {"tensor_parallel"}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_oracle(name):
    fn, params = CASES[name]()
    groups, plan = check(fn, params, (X,))
    assert not groups.unknown
    if name == "tensor_parallel":  # a unit is a column on each of four devices
        (group,) = groups
        assert (group.size, group.unit_size) == (4, 4 * (5 + 1 + 3))
        np.testing.assert_array_equal(group.members[0].index, np.arange(4)[:, None] + [[0, 4, 8, 12]])
        assert channels.flops(groups) == 2 * 4 * 6 * 16 * (5 + 3)  # over all devices
        small = jax.jit(channels.shrink(fn, params, plan))
        assert "shard_map" in str(jax.make_jaxpr(small)(plan.apply(params), X))


def test_heads_over_devices_are_groups_of_pairs():
    fn, params = CASES["attention_over_heads"]()
    groups = channels.groups(fn, params, X)
    assert sorted((g.size, max(m.index.shape[1] for m in g.members)) for g in groups) == [(2, 8), (4, 4), (4, 4)]


def test_a_single_index_a_shard_stays():
    params = {"a": Maker()(5, 4), "c": Maker()(4, 3)}
    fn = over(lambda p, x: lax.psum(x @ p["a"] @ p["c"], "model"), {"a": COLUMNS, "c": ROWS})
    groups = channels.groups(fn, params, X)
    assert len(groups) == 0 and "cut into shards" in groups.frozen["a[1]"]


def test_what_has_no_rule_inside_stays_whole_and_is_reported():
    m = Maker()
    params = {"a": m(5, 8), "b": m(8, 8), "c": m(8, 3)}

    def body(p, x):
        h = jnp.tanh(x @ p["a"])
        offsets, sizes = jnp.arange(2, dtype=jnp.int32), jnp.ones(2, jnp.int32)
        h = lax.ragged_all_to_all(h, h, offsets, sizes, offsets, sizes, axis_name="data")
        return jnp.tanh(h @ p["b"]) @ p["c"]

    groups = channels.groups(over(body, P(), check_vma=False), params, X)
    assert groups.unknown == {"ragged_all_to_all": 1}
    assert "'ragged_all_to_all' has no rule" in groups.frozen["a[1]"]
    assert [g.name for g in groups] == ["b[1]"]


def test_a_place_computed_from_the_device_stays_whole():
    params = {"a": Maker()(5, 8), "c": Maker()(2, 3)}

    def body(p, x):
        h = jnp.tanh(x @ p["a"])
        part = lax.dynamic_slice_in_dim(h, 2 * lax.axis_index("model"), 2, 2)
        return lax.psum(part @ p["c"], "model")

    groups = channels.groups(over(body, P()), params, X)
    assert "computed" in groups.frozen["a[1]"]
    assert len(groups) == 0


def test_explicit_axes_are_told():
    explicit = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:4])
    params = {"a": jax.device_put(Maker()(5, 8), jax.NamedSharding(explicit, COLUMNS)), "b": Maker()(8, 3)}

    def fn(p, x):
        h = jax.shard_map(lambda a, x: jnp.tanh(x @ a), mesh=explicit, in_specs=(COLUMNS, P()), out_specs=COLUMNS)
        return jax.sharding.reshard(h(p["a"], x), P()) @ p["b"]

    with pytest.raises(ValueError, match=r"(?s)in_specs.*Explicit axes of a mesh.*AxisType.Auto"):
        channels.groups(fn, params, X[0])

    def moved(p, x):
        return jax.sharding.reshard(jnp.tanh(x @ p["a"]), P()) @ p["b"]

    with jax.set_mesh(explicit):
        (group,) = channels.groups(moved, params, X[0])
    assert (group.name, group.size) == ("a[1]", 8)


def test_axes_that_vmap_gave_a_name_are_the_arrays_own():
    """Batch normalisation over a named axis, members added up and compared: `vmap` makes them axes of the array."""
    m = Maker()
    params = {"a": m(5, 8), "s": m(8), "c": m(2, 3, 8, 4), "d": m(2, 3, 8, 4)}

    def fn(p, x):
        def normed(x):
            h = x @ p["a"]
            mean = lax.pmean(h.mean(0), "batch")
            return jnp.tanh((h - mean) * lax.rsqrt(lax.pmean(jnp.square(h - mean).mean(0), "batch") + 1e-5) * p["s"])

        def member(c, d):
            return lax.psum(h @ c, ("inner", "outer")) + lax.pmax(lax.stop_gradient(h @ d), "inner")

        h = jax.vmap(normed, axis_name="batch")(x)
        of = jax.vmap(member, axis_name="inner", out_axes=None)
        return jax.vmap(of, axis_name="outer")(p["c"], p["d"])[0]

    groups = channels.groups(fn, params, X)
    assert {g.name: g.size for g in groups} == {"a[1]": 8, "c[0]": 2, "c[1]": 3} and not groups.unknown
    assert "'pmax' runs along it" in groups.frozen["d[1]"]
    plan = channels.from_units(groups, {"a[1]": [0, 3, 7], "c[0]": [1], "c[1]": [0]})
    found = channels.verify(fn, params, plan, X)
    assert found.ok, found
