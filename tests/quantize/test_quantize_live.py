"""Folding while statistics live: against a closed form, and against conversion."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxcompress.linen
import jaxcompress.nnx
from jaxcompress import compressed, dense, quantize
from jaxcompress.quantize import Affine

TENSOR = Affine(3, axes=())


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(6, (3, 3))(x)))
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(6, (1, 1), use_bias=False)(x))
        return nn.Dense(3)((nn.relu(y) + x).mean((1, 2)))


@pytest.fixture
def net(rng):
    x = jnp.asarray(rng.normal(size=(4, 5, 5, 2)), jnp.float32)
    variables = jax.jit(Net().init)(jax.random.key(0), x)

    def leaf(path, x):
        positive = path[-1].key == "var"
        if path[0].key == "params" and path[-1].key == "kernel":
            return x
        return jnp.asarray(rng.uniform(0.3, 3, x.shape) if positive else rng.normal(size=x.shape), jnp.float32)

    variables = jax.tree_util.tree_map_with_path(leaf, variables)
    norm = variables["params"]["BatchNorm_0"]
    norm["scale"] = norm["scale"].at[1].set(0)
    return Net(), variables, x


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(2, 6, (3, 3), rngs=rngs), nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


def test_wrappers_are_the_transform(net):
    """Linen's and NNX's, in training: the result and the new statistics."""
    model, variables, x = net
    rules, how = (("kernel$", TENSOR),), {"train": True, "mutable": ["batch_stats"]}
    wanted = quantize.fake(model.apply, rules, fold=True)(variables, x, **how)
    got = jaxcompress.linen.FakeQuantized(model, rules, fold=True).apply(variables, x, **how)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    plain = jaxcompress.linen.FakeQuantized(model, rules).apply(variables, x, **how)
    assert float(jnp.max(jnp.abs(plain[0] - wanted[0]))) > 1e-2

    module = NnxNet(nnx.Rngs(0))
    apply, params, rest = jaxcompress.nnx.functional(module)
    wanted, rest = quantize.fake(apply, rules, fold=True)(params, rest, x)
    np.testing.assert_array_equal(jaxcompress.nnx.FakeQuantized(module, rules, fold=True)(x), wanted)
    np.testing.assert_array_equal(module.norm.mean[...], rest["norm"]["mean"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("product", [lambda x, w: x @ w.T, lambda x, w: (w @ x.T).T], ids=["behind", "in front"])
def test_kernels_that_are_cast_and_transposed_on_their_way(product, dtype, rng):
    """In mixed precision, and stored outputs first: the rounding is that of the folded kernel in its own dtype."""
    shapes = {"kernel": (6, 4), "scale": (6,), "shift": (6,)}
    params = {name: jnp.asarray(rng.uniform(0.3, 3, shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(5, 4)), dtype)

    def fn(p, x):
        return product(x, p["kernel"].astype(dtype)) * p["scale"] + p["shift"]

    rules = {"kernel": TENSOR}
    folded = dense(TENSOR.convert(params["kernel"] * params["scale"][:, None]))
    wanted = x.astype(jnp.float32) @ folded.T + params["shift"]
    rounding = {jnp.float32: 1e-5, jnp.bfloat16: 0.03}[dtype]
    np.testing.assert_allclose(quantize.fake(fn, rules, fold=True)(params, x), wanted, rtol=rounding, atol=rounding)
    unfolded = quantize.fake(fn, rules)(params, x)
    assert float(jnp.max(jnp.abs(unfolded - wanted))) > 0.3


def test_a_scale_of_places_is_none_of_channels(rng):
    """As many places as channels: shapes do not tell them apart."""
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "scale": jnp.arange(1.0, 5)}
    x = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    with pytest.raises(ValueError, match="nothing to fold"):
        quantize.fake(lambda p, x: x @ p["kernel"] * p["scale"][:, None], {"kernel": TENSOR}, fold=True)(params, x)


BOTH = Affine(4, axes=(), symmetric=False, activation_bits=8)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("weights", "dynamic", "static")]
)
def test_with_running_averages_it_is_the_folded_model_in_integers(kind, net):
    model, variables, x = net
    rules, ranges = {"kernel$": TENSOR if kind == "weights" else BOTH}, None
    small = quantize.convert(quantize.fold(model.apply, variables, x), rules)
    if kind == "static":
        ranges = quantize.input_ranges(model.apply, variables, [x / 2], rules, symmetric=False)
        small = quantize.static(small, ranges)
    wanted = compressed(model.apply)(small, x)
    got = jax.jit(quantize.fake(model.apply, rules, ranges, fold=True))(variables, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    unfolded = quantize.fake(model.apply, rules, ranges)(variables, x)
    assert float(jnp.max(jnp.abs(unfolded - wanted))) > 1e-2


def test_training_by_hand(rng):
    """Statistics of the unrounded product; the rounded one, folded, is what they normalise."""
    x, w = rng.normal(size=(32, 5)), rng.normal(size=(5, 4))
    scale, shift = rng.normal(size=4), rng.normal(size=4)

    def run(p, x):
        y = x @ p["kernel"]
        mean, var = y.mean(0), y.var(0)
        return (y - mean) / jnp.sqrt(var + 1e-3) * p["scale"] + p["shift"], mean

    params = {"kernel": w, "scale": scale, "shift": shift}
    params = {name: jnp.asarray(v, jnp.float32) for name, v in params.items()}
    y = x @ w
    m = scale / np.sqrt(y.var(0) + 1e-3)
    step = np.abs(w * m).max() / 3
    wanted = x @ (np.round(w * m / step) * step) - y.mean(0) * m + shift
    apply = quantize.fake(run, {"kernel": TENSOR}, fold=True)
    got, mean = apply(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(mean, y.mean(0), rtol=1e-4, atol=1e-5)
    # straight through: with a linear loss the scale's gradient is that of the float function
    pull = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)
    theirs, ours = (jax.grad(lambda p, f=f: jnp.sum(f(p, jnp.float32(x))[0] * pull))(params) for f in (run, apply))
    np.testing.assert_allclose(ours["shift"], theirs["shift"], rtol=1e-4)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(ours))


def test_it_trains_and_statistics_move_as_without(net):
    model, variables, x = net
    labels, tx = jnp.arange(4) % 3, optax.adam(1e-2)
    apply = quantize.fake(model.apply, {"Conv_\\d/kernel$": TENSOR}, fold=True)

    @jax.jit
    def step(params, stats, state):
        def loss(params):
            logits, new = apply({"params": params, **stats}, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), new, state

    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    _, float_stats = model.apply(variables, x, train=True, mutable=["batch_stats"])
    state, losses = tx.init(params), []
    for i in range(30):
        value, params, stats, state = step(params, stats, state)
        losses.append(float(value))
        if i == 0:  # of the first norm: nothing before it is rounded
            first, wanted = (s["batch_stats"]["BatchNorm_0"] for s in (stats, float_stats))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), first, wanted)
    assert losses[-1] < 0.5 * losses[0]
    assert all(bool(jnp.all(jnp.isfinite(v))) for v in jax.tree.leaves(params))


def test_nothing_to_fold(rng):
    params, x = {"kernel": jnp.ones((3, 4)), "scale": jnp.ones(4)}, jnp.ones((2, 3))
    for fn in (
        lambda p, x: jax.nn.relu(x @ p["kernel"]) * p["scale"],  # not affine
        lambda p, x: (x @ p["kernel"] * p["scale"], x @ p["kernel"]),  # used twice
        lambda p, x: (lambda y: (y * p["scale"], y))(x @ p["kernel"]),  # as it is, too
    ):
        with pytest.raises(ValueError, match="nothing to fold: behind no chosen kernel"):
            quantize.fake(fn, {"kernel": TENSOR}, fold=True)(params, x)
