"""Flax modules of the sizes that a plan leaves: wrapped ones that run anything, and plain ones where that can be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcompress import linen as jlinen
from jaxcompress import nnx as jnnx
from jaxcompress.paths import named_leaves
from jaxcompress.prune import channels

IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 3)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 6)), jnp.float32)
slow = pytest.mark.slow


def noisy(tree):
    """Away from the zeros and ones that normalisations and biases start with."""
    rng = np.random.default_rng(2)

    def moved(x):
        return x + jnp.asarray(rng.uniform(0.1, 0.4, x.shape), x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(moved, tree)


def halved(fn, params, x):
    groups = channels.groups(fn, params, x)
    return channels.plan(groups, channels.norm(groups, params), 0.5)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance * float(np.abs(b).max()))


# NNX


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)])
        self.head = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


class Convs(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.grouped = nnx.Conv(8, 12, (3, 3), feature_group_count=4, rngs=rngs)
        self.depthwise = nnx.Conv(12, 12, (3, 3), feature_group_count=12, rngs=rngs)
        self.up = nnx.ConvTranspose(12, 8, (2, 2), strides=2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.depthwise(self.grouped(nnx.relu(self.norm(self.a(x))))))
        return self.head(self.drop(self.up(x)).mean((1, 2)))


class GroupNormed(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 12, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(12, num_groups=4, rngs=rngs)
        self.head = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(6, 12, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 12, 16, decode=False, rngs=rngs)
        self.up = nnx.LinearGeneral(12, (2, 5), rngs=rngs)
        self.down = nnx.LinearGeneral((2, 5), 12, axis=(-2, -1), rngs=rngs)
        self.head = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x + self.attention(x)
        return self.head(x + self.down(nnx.gelu(self.up(x))))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.RNN(nnx.OptimizedLSTMCell(6, 8, rngs=rngs), rngs=rngs)
        self.b = nnx.RNN(nnx.GRUCell(8, 6, rngs=rngs), rngs=rngs)
        self.c = nnx.RNN(nnx.SimpleCell(6, 4, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.c(self.b(self.a(x))))


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(6, 12, rngs=rngs)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.head = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.embed(x)))


class Reshaping(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 12, rngs=rngs)
        self.heads, self.width = 3, 4
        self.down = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.up(x).reshape(*x.shape[:-1], self.heads, self.width))
        return self.down(h.reshape(*x.shape[:-1], self.heads * self.width))


def nnx_case(make, x, dropped=None):
    """A model away from its initialisation, its function and state, and a plan that drops half of every group."""
    graph, state = nnx.split(make(nnx.Rngs(0)))
    model = nnx.merge(graph, noisy(state))
    graph, state = nnx.split(model)

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    if dropped is None:
        return model, fn, state, halved(fn, state, x)
    groups = channels.groups(fn, state, x)
    return model, fn, state, channels.from_units(groups, {name: np.array(units) for name, units in dropped.items()})


PLAIN = [
    pytest.param(Mlp, TOKENS, None, {"layers/0": {"out_features": 4}, "head": {"in_features": 5}}, id="mlp"),
    pytest.param(
        Convs, IMAGES, None,
        {"grouped": {"feature_group_count": 2}, "depthwise": {"feature_group_count": 4, "in_features": 4}},
        id="convs", marks=slow,
    ),
    pytest.param(
        Attention, TOKENS, None, {"attention": {"num_heads": 1, "head_dim": 4, "in_features": 6}}, id="mha", marks=slow
    ),
    pytest.param(Recurrent, TOKENS, None, {"a/cell": {"hidden_features": 4}}, id="cells", marks=slow),
]  # fmt: skip


@pytest.mark.parametrize(("make", "x", "dropped", "sizes"), PLAIN)
def test_nnx_plain_modules_of_smaller_sizes(make, x, dropped, sizes):
    model, fn, state, plan = nnx_case(make, x, dropped)
    before = jax.tree.map(jnp.shape, state)
    small = jnnx.pruned(model, plan, x)
    close(nnx.jit(lambda m, x: m(x))(small, x), jax.jit(fn)(plan.mask(state), x))
    layers = {"/".join(map(str, path)): layer for path, layer in nnx.iter_modules(small)}
    for path, wanted in sizes.items():
        assert {key: getattr(layers[path], key) for key in wanted} == wanted, path
    assert type(small) is make and jax.tree.map(jnp.shape, nnx.state(model)) == before
    assert jax.tree.map(jnp.shape, nnx.state(small)) == jax.tree.map(jnp.shape, plan.apply(state))


@slow
def test_nnx_whole_groups_of_a_group_normalisation_may_go_and_parts_of_them_are_refused():
    groups = {g.name: g.size for g in channels.groups(*nnx_case(GroupNormed, IMAGES)[1:3], IMAGES)}
    of_groups = next(name for name, size in groups.items() if size == 4)
    within = next(name for name, size in groups.items() if size == 3)
    model, fn, state, plan = nnx_case(GroupNormed, IMAGES, {of_groups: [0, 2]})
    small = jnnx.pruned(model, plan, IMAGES)
    assert (small.norm.num_groups, small.norm.group_size) == (2, 3)
    close(small(IMAGES), fn(plan.mask(state), IMAGES))
    model, fn, state, plan = nnx_case(GroupNormed, IMAGES, {within: [1]})
    with pytest.raises(ValueError, match=r"GroupNormed differs by .*'norm' \(GroupNorm\(.*Take rederive=True"):
        jnnx.pruned(model, plan, IMAGES)
    small = jnnx.pruned(model, plan, IMAGES, rederive=True)
    assert (small.norm.num_groups, small.norm.group_size) == (4, 2)
    wanted = channels.shrink(fn, state, plan, rederive=True)(plan.apply(state), IMAGES)
    close(small(IMAGES), wanted)
    close(jnnx.Pruned(model, plan, rederive=True)(IMAGES), wanted)


@slow
def test_nnx_a_layer_normalisation_is_named():
    model, *_, plan = nnx_case(Normed, TOKENS)
    with pytest.raises(ValueError, match=r"of the layer 'norm' \(LayerNorm\(.*num_features=6.*Take rederive=True"):
        jnnx.pruned(model, plan, TOKENS)


def test_nnx_sizes_in_a_models_own_code_are_named_and_the_wrapper_runs_them():
    model, fn, state, plan = nnx_case(Reshaping, TOKENS)
    with pytest.raises(ValueError, match=r"the model itself \(Reshaping\(.*heads=3, width=4.*Pruned\(module, plan\)"):
        jnnx.pruned(model, plan, TOKENS)
    small = jnnx.Pruned(model, plan)
    close(nnx.jit(lambda m, x: m(x))(small, TOKENS), fn(plan.mask(state), TOKENS))
    assert small.inner.up.kernel.shape == (6, 4) and model.up.kernel.shape == (6, 12)


@slow
def test_nnx_wrapped_modules_train_with_their_statistics_and_are_cut_again():
    class Trained(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x, train=False):
            x = nnx.relu(self.norm(self.conv(x), use_running_average=not train))
            return self.head(self.drop(x.mean((1, 2)), deterministic=not train))

    model, _, state, plan = nnx_case(Trained, IMAGES)
    small, masked = jnnx.Pruned(model, plan), nnx.merge(nnx.graphdef(model), plan.mask(state))
    step = nnx.jit(lambda m, x: m(x, train=True))
    for _ in range(2):  # the second step's dropout differs, alike in both
        close(step(small, IMAGES), step(masked, IMAGES))
    kept = plan.keep["norm/mean"][0]
    close(small.inner.norm.mean[...], masked.norm.mean[...][kept])

    def gradients(module):
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        found = jax.grad(lambda p: (nnx.merge(graph, p, rest)(IMAGES) ** 2).sum())(params)
        return dict(named_leaves(found))

    close(gradients(small)["inner/head/kernel"], gradients(masked)["head/kernel"][kept])
    graph, cut = nnx.split(small)

    def again(state, x):
        return nnx.merge(graph, state)(x)

    second = halved(again, cut, IMAGES)
    assert second.widths == {"inner/conv/kernel[3]": (4, 2)}
    close(jnnx.Pruned(small, second)(IMAGES), again(second.mask(cut), IMAGES))


class Stacked(nnx.Module):
    """Layers that `nnx.vmap` made, which `nnx.scan` runs: their arrays have one axis more."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs), in_axes=(0,), out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)
        self.first, self.last = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        run = nnx.scan(lambda h, layer: h + jnp.tanh(layer(h)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.last(run(self.first(x), self.layers))


def test_nnx_layers_that_are_stacked():
    model = Stacked(nnx.Rngs(0))
    graph, state = nnx.split(model)
    plan = halved(lambda state, x: nnx.merge(graph, state)(x), state, TOKENS)
    small = jnnx.pruned(model, plan, TOKENS)
    assert (small.layers.in_features, small.layers.out_features) == (4, 4)
    close(small(TOKENS), nnx.merge(graph, plan.mask(state))(TOKENS))


# Linen


class Encoder(nn.Module):
    width: int = 12
    heads: int = 2
    qkv: int = 16
    hidden: int = 20

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.width)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, qkv_features=self.qkv)(x)
        h = nn.Dropout(0.5, deterministic=not train)(nn.gelu(nn.Dense(self.hidden)(x)))
        x = nn.BatchNorm(use_running_average=not train)(x + nn.Dense(self.width)(h))
        return nn.Dense(3)(x)


class Coded(nn.Module):
    """Its sizes stand in its code: a recurrent cell, a grouped convolution, a reshape."""

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.GRUCell(6))(nn.relu(nn.Dense(8)(x)))
        x = nn.Conv(9, (3,), feature_group_count=3)(x)
        return nn.Dense(3)(jnp.tanh(x.reshape(*x.shape[:2], 3, 3)).reshape(*x.shape[:2], 9))


class Normalised(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.GroupNorm(1)(nn.Dense(self.width)(x)))


def linen_case(model, x):
    variables = noisy(jax.jit(model.init)(jax.random.key(0), x))
    return variables, halved(model.apply, variables, x)


@slow
def test_linen_wrapped_modules_initialise_run_train_and_export():
    model = Encoder()
    variables, plan = linen_case(model, TOKENS)
    small, cut = jlinen.Pruned(model, plan), plan.apply(variables)
    masked = plan.mask(variables)
    drawn = jax.eval_shape(small.init, jax.random.key(0), TOKENS)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, cut)
    run = jax.jit(small.apply)
    close(run(cut, TOKENS), model.apply(masked, TOKENS))

    def train(module, v):
        return module.apply(v, TOKENS, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(3)})

    uncut = jlinen.Pruned(model, channels.from_units(channels.groups(model.apply, variables, TOKENS), {}))
    (found, state), (wanted, whole_state) = jax.jit(lambda a, b: (train(small, a), train(uncut, b)))(cut, masked)
    close(found, wanted)
    kept = plan.keep["batch_stats/BatchNorm_0/mean"][0]
    close(state["batch_stats"]["BatchNorm_0"]["mean"], whole_state["batch_stats"]["BatchNorm_0"]["mean"][kept])
    exported = jax.export.export(run)(cut, TOKENS)
    close(exported.call(cut, TOKENS), run(cut, TOKENS))


@slow
def test_linen_wrapped_modules_are_cut_again_and_stand_in_larger_ones():
    model = Encoder()
    variables, plan = linen_case(model, TOKENS)
    small, cut = jlinen.Pruned(model, plan), plan.apply(variables)
    second = halved(small.apply, cut, TOKENS)
    assert second.parameters[0] == plan.parameters[1]
    twice = jlinen.Pruned(small, second)
    close(jax.jit(twice.apply)(second.apply(cut), TOKENS), jax.jit(small.apply)(second.mask(cut), TOKENS))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(jlinen.Pruned(Encoder(), plan, name="encoder")(x))

    made = jax.jit(Outer().init)(jax.random.key(0), TOKENS)
    assert made["params"]["encoder"]["Dense_0"]["kernel"].shape == (6, 6)
    assert Outer().apply(made, TOKENS).shape == (2, 5, 2)


def test_linen_sizes_in_code_are_named_and_the_wrapper_runs_them():
    variables, plan = linen_case(Coded(), TOKENS)
    small = jlinen.Pruned(Coded(), plan)
    close(jax.jit(small.apply)(plan.apply(variables), TOKENS), Coded().apply(plan.mask(variables), TOKENS))
    with pytest.raises(ValueError, match=r"no attributes of Coded .* the layer '.*' \(\w+\(.* makes '.*' of shape"):
        jlinen.pruned(Coded(), variables, plan, TOKENS)


@pytest.mark.slow
def test_linen_plain_modules_whose_attributes_are_their_sizes():
    """The heads' width and number, the residual stream and the hidden layer, with the queries scaled."""
    model = Encoder()
    variables, plan = linen_case(model, TOKENS)
    small, cut = jlinen.pruned(model, variables, plan, TOKENS)
    assert small == Encoder(width=6, heads=1, qkv=4, hidden=10)
    close(small.apply(cut, TOKENS), model.apply(plan.mask(variables), TOKENS))


@slow
def test_linen_sequential_and_a_normalisation_that_is_named():
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(10), nn.relu, nn.Dense(2)])
    variables, plan = linen_case(model, TOKENS)
    small, cut = jlinen.pruned(model, variables, plan, TOKENS)
    assert [layer.features for layer in small.layers if isinstance(layer, nn.Dense)] == [4, 5, 2]
    close(small.apply(cut, TOKENS), model.apply(plan.mask(variables), TOKENS))
    variables, plan = linen_case(Normalised(), TOKENS)
    with pytest.raises(ValueError, match=r"Normalised differs by .* 'GroupNorm_0' \(GroupNorm\).*Take rederive=True"):
        jlinen.pruned(Normalised(), variables, plan, TOKENS)
    small, cut = jlinen.pruned(Normalised(), variables, plan, TOKENS, rederive=True)
    assert small.width == 4
