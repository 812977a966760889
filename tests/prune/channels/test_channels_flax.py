"""Linen and NNX models: the oracle on their own trees, batch statistics that are written, and NNX's smaller arrays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_channels_zoo import some_units

from jaxcompress import linen, quantize
from jaxcompress.prune import channels

IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 3)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 6)), jnp.float32)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        def norm():
            return nn.BatchNorm(use_running_average=not train)

        x = nn.relu(norm()(nn.Conv(6, (3, 3))(x)))
        h = nn.relu(norm()(nn.Conv(8, (3, 3), (2, 2))(x)))
        h = nn.Conv(8, (3, 3), feature_group_count=8)(h)
        x = norm()(nn.Conv(6, (3, 3))(h)) + nn.Conv(6, (1, 1), (2, 2))(x)
        return nn.Dense(3)(nn.GroupNorm(3)(x).mean((1, 2)))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(h)
        return nn.Dense(3)(x + nn.Dense(6)(nn.gelu(nn.Dense(10)(nn.LayerNorm()(x)))))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        body = nn.remat(type("Body", (nn.Module,), {"__call__": nn.compact(lambda self, x, _: (x + _mlp(x), None))}))
        layers = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers()(x, None)
        return nn.Dense(3)(x)


def _mlp(x):
    return nn.Dense(x.shape[-1])(nn.silu(nn.Dense(8)(x)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(6))(x)
        return nn.Dense(3)(nn.RNN(nn.GRUCell(5))(x))


def noisy(tree):
    """Away from the zeros and ones that normalisations and biases start with."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(2)

    def is_float(x):
        return jnp.issubdtype(x.dtype, jnp.floating)

    moved = [x + jnp.asarray(rng.uniform(0.1, 0.4, x.shape), x.dtype) if is_float(x) else x for x in leaves]
    return structure.unflatten(moved)


def checked(fn, params, x, free_out=()):
    groups = channels.groups(fn, params, x, free_out=free_out)
    plan = channels.from_units(groups, some_units(groups, 0))
    assert plan.parameters[1] < plan.parameters[0]
    found = channels.verify(fn, params, plan, x)
    assert found.ok, f"{found}\n{groups}"
    return groups, plan


LINEN = {"residual": (Residual, IMAGES), "encoder": (Encoder, TOKENS), "scanned": (Scanned, TOKENS)}
LINEN["recurrent"] = (Recurrent, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LINEN))
def test_linen(name):
    module, x = LINEN[name]
    model = module()
    variables = noisy(jax.jit(model.init)(jax.random.key(0), x))
    groups, _ = checked(model.apply, variables, x)
    assert len(groups) >= 2
    assert not groups.unknown


@pytest.mark.slow
def test_linen_batch_statistics_that_are_written_may_shrink():
    model = Residual()
    variables = noisy(jax.jit(model.init)(jax.random.key(0), IMAGES))

    def train(v, x):
        return model.apply(v, x, train=True, mutable=["batch_stats"])

    frozen = channels.groups(train, variables, IMAGES)
    groups, plan = checked(train, variables, IMAGES, free_out=["batch_stats"])
    assert len(groups) > len(frozen)
    small = channels.shrink(train, variables, plan)
    cut = plan.apply(variables)
    logits, state = jax.eval_shape(small, cut, IMAGES)
    assert jax.tree.map(jnp.shape, state["batch_stats"]) == jax.tree.map(jnp.shape, cut["batch_stats"])
    assert logits.shape == (2, 3)


class Outer(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(self.inner(x)))


def test_a_wrapper_of_a_wrapper():
    """What is wrapped may hold a module under the name that the wrapper itself has for it, `inner`."""
    model, x = Outer(nn.Dense(8)), TOKENS[0]
    variables = model.init(jax.random.key(0), x)
    plan = channels.plan(groups := channels.groups(model.apply, variables, x), channels.norm(groups, variables), 0.5)
    pruned, spec = linen.Pruned(model, plan), quantize.Affine(4)
    wrapped, small = linen.FakeQuantized(pruned, (("kernel$", spec),)), plan.apply(variables)
    shapes = jax.tree.map(jnp.shape, small)
    assert shapes["params"]["inner"]["kernel"] == (6, 4)
    assert jax.tree.map(jnp.shape, wrapped.init(jax.random.key(0), x)) == shapes
    expected = quantize.fake(pruned.apply, {"kernel$": spec})(small, x)
    np.testing.assert_allclose(wrapped.apply(small, x), expected, rtol=1e-6)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.head(x.mean((1, 2)))


def test_nnx_and_its_model_with_smaller_arrays():
    graph, state = nnx.split(Net(nnx.Rngs(0)))
    state = noisy(state)

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    groups, plan = checked(fn, state, IMAGES)
    assert {group.size for group in groups} == {6, 8}
    cut = plan.apply(state)
    model = nnx.merge(graph, cut)  # these layers read their sizes from their arrays
    np.testing.assert_allclose(model(IMAGES), fn(plan.mask(state), IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_nnx_attention():
    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.MultiHeadAttention(2, 6, 8, decode=False, rngs=rngs)
            self.n = nnx.RMSNorm(6, rngs=rngs)
            self.h = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.h(x + self.a(self.n(x)))

    graph, state = nnx.split(Attention(nnx.Rngs(0)))
    checked(lambda state, x: nnx.merge(graph, state)(x), noisy(state), TOKENS)
