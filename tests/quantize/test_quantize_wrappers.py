"""Fake quantization as Linen and NNX modules: the same numbers as the function transform, in any place of a model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxcompress.nnx
from jaxcompress import linen, quantize
from jaxcompress.arrays import compressed, dense

RULES = (("kernel$", quantize.Affine(bits=8, activation_bits=8)),)


def test_linen_wrapper_is_the_transform(net):
    model, variables, x = net
    wrapped = linen.FakeQuantized(model, RULES)
    own = jax.jit(wrapped.init)(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, own, variables)
    fake = quantize.fake(model.apply, RULES)
    np.testing.assert_allclose(wrapped.apply(variables, x), fake(variables, x), rtol=1e-6)
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(1)}, "mutable": ["batch_stats"]}
    (_, updates), (_, expected) = wrapped.apply(variables, x, **kwargs), fake(variables, x, **kwargs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


def test_linen_wrapper_inside_a_larger_model(net):
    model, _, x = net

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="plain")(linen.FakeQuantized(type(model)(name="body"), RULES)(x))

    variables = jax.jit(Outer().init)(jax.random.key(0), x)
    body = {name: tree["body"] for name, tree in variables.items()}
    inner = quantize.fake(model.apply, RULES)(body, x)
    expected = inner @ variables["params"]["plain"]["kernel"] + variables["params"]["plain"]["bias"]
    np.testing.assert_allclose(jax.jit(Outer().apply)(variables, x), expected, rtol=1e-4, atol=1e-5)
    grads = jax.grad(lambda v: jnp.sum(Outer().apply(v, x) ** 2))(variables)
    assert all(float(jnp.max(jnp.abs(g))) > 0 for g in jax.tree.leaves(grads["params"]["body"]["head"]))


def test_linen_wrapper_with_ranges(net):
    """Calibrated ranges, also in a module that Linen hashes (`nn.jit`)."""
    model, variables, x = net
    ranges = quantize.input_ranges(model.apply, variables, [x[:2] / 2], RULES, symmetric=False)
    wanted = quantize.fake(model.apply, RULES, ranges)(variables, x)
    wrapped = linen.FakeQuantized(model, RULES, ranges)
    np.testing.assert_allclose(wrapped.apply(variables, x), wanted, rtol=1e-6)
    assert float(jnp.max(jnp.abs(wanted - quantize.fake(model.apply, RULES)(variables, x)))) > 1e-3  # some are clipped
    assert hash(wrapped) == hash(wrapped.clone()) != hash(linen.FakeQuantized(model, RULES))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.conv(x))).mean((1, 2))))


def test_linen_wrapper_lets_out_what_is_sown_and_makes_new_variables():
    """Collections that the variables at hand have not: intermediates, and a cache that the first call makes."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(4)(x)
            self.sow("intermediates", "y", y)
            calls = self.variable("cache", "calls", lambda: jnp.zeros(()))
            calls.value += 1
            return y

    x = jnp.ones((2, 3))
    params = {"params": Net().init(jax.random.key(0), x)["params"]}
    wrapped = linen.FakeQuantized(Net(), rules=(("kernel$", quantize.Affine(2)),))
    for mutable in (["intermediates", "cache"], True):
        out, new = wrapped.apply(params, x, mutable=mutable)
        np.testing.assert_array_equal(new["intermediates"]["y"][0], out)
        _, new = wrapped.apply({**params, "cache": new["cache"]}, x, mutable=["cache"])
        assert float(new["cache"]["calls"]) == 2 and set(new) == {"cache"}


def test_nnx_wrapper_lets_out_what_is_sown():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(3, 4, rngs=rngs)
            self.calls = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            y = self.inner(x)
            self.calls[...] += 1
            self.sow(nnx.Intermediate, "y", y)
            return y

    x = jnp.ones((2, 3))
    wrapped = jaxcompress.nnx.FakeQuantized(Net(nnx.Rngs(0)), [("kernel$", quantize.Affine(2))])
    for _ in range(2):
        out, sown = nnx.capture(wrapped, nnx.Intermediate)(x)
        np.testing.assert_array_equal(sown["inner"]["y"][0], out)
    with pytest.warns(DeprecationWarning):
        wrapped(x)
        wrapped(x)
    assert len(wrapped.inner.y.get_value()) == 2 and float(wrapped.inner.calls[...]) == 4


def test_nnx_wrapper_is_the_transform(net):
    *_, x = net
    model = NnxNet(nnx.Rngs(0))
    model.eval()
    apply, params, rest = jaxcompress.nnx.functional(model)
    wrapped = jaxcompress.nnx.FakeQuantized(model, RULES)
    expected, _ = quantize.fake(apply, RULES)(params, rest, x)
    np.testing.assert_allclose(wrapped(x), expected, rtol=1e-6)
    ranges = quantize.input_ranges(lambda p, x: apply(p, rest, x)[0], params, [x[:2] / 2], RULES)
    with_ranges, _ = quantize.fake(apply, RULES, ranges)(params, rest, x)
    np.testing.assert_allclose(jaxcompress.nnx.FakeQuantized(model, RULES, ranges)(x), with_ranges, rtol=1e-6)
    assert float(jnp.max(jnp.abs(with_ranges - expected))) > 1e-3
    integers, _ = jax.jit(compressed(apply, strict=True))(quantize.convert(params, RULES), rest, x)
    np.testing.assert_allclose(wrapped(x), integers, rtol=1e-4, atol=1e-4)


def test_nnx_wrapper_trains_and_keeps_its_state(net):
    *_, x = net
    model = jaxcompress.nnx.FakeQuantized(NnxNet(nnx.Rngs(0)), RULES)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    labels = jnp.arange(4)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    mean, kernel = np.asarray(model.inner.norm.mean[...]), np.asarray(model.inner.head.kernel[...])
    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < losses[0]
    assert not np.allclose(model.inner.norm.mean[...], mean)
    assert model.inner.head.kernel[...].dtype == kernel.dtype and not np.allclose(model.inner.head.kernel[...], kernel)


def test_linen_rounds_modules_of_its_own_and_names_those_of_others(rng):
    """Of a module that a larger one has, the variables are not among the wrapped one's."""
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)

    class Head(nn.Module):
        dense: nn.Module

        def __call__(self, x):
            return self.dense(x) + 1

    class Outer(nn.Module):
        own: bool

        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(4, parent=None) if self.own else nn.Dense(4)
            return linen.FakeQuantized(Head(shared), (("kernel$", quantize.Affine(3)),))(x)

    with pytest.raises(ValueError, match=r"Dense 'Dense_0' in Head: it belongs to Outer"):
        Outer(own=False).init(jax.random.key(0), x)
    variables = Outer(own=True).init(jax.random.key(0), x)
    rounded = dense(quantize.convert(variables, {"kernel$": quantize.Affine(3)}))
    (head,) = rounded["params"].values()
    expected = x @ head["dense"]["kernel"] + 1
    np.testing.assert_allclose(Outer(own=True).apply(variables, x), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "scheme",
    [
        quantize.Ternary(axes=(-1,)),
        quantize.Binary(),
        quantize.NF4(),
        quantize.Floats("float8_e4m3fn", inputs="float8_e4m3fn"),
    ],
    ids=lambda scheme: type(scheme).__name__,
)
def test_wrappers_take_every_scheme(scheme, net):
    model, variables, x = net
    rules: tuple[tuple[str, quantize.Scheme], ...] = (("kernel$", scheme),)
    expected = quantize.fake(model.apply, rules)(variables, x)
    np.testing.assert_allclose(linen.FakeQuantized(model, rules).apply(variables, x), expected, rtol=1e-6)
    converted = compressed(model.apply)(quantize.convert(variables, rules), x)
    np.testing.assert_allclose(converted, expected, rtol=1e-4, atol=1e-4)
    module = NnxNet(nnx.Rngs(0))
    module.eval()
    apply, params, rest = jaxcompress.nnx.functional(module)
    expected, _ = quantize.fake(apply, rules)(params, rest, x)
    np.testing.assert_allclose(jaxcompress.nnx.FakeQuantized(module, rules)(x), expected, rtol=1e-6)
