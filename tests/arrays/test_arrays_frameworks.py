"""Unmodified Linen and NNX models on compressed weights, in float32 and bfloat16 compute."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress.nnx
from jaxcompress import quantize
from jaxcompress.arrays import Sparse, compressed, dense, nbytes, watch
from jaxcompress.paths import named_leaves

KERNELS = {"(kernel|embedding)$": quantize.Affine()}


class Block(nn.Module):
    """Attention (DenseGeneral kernels of rank 3), a hidden layer, and what gets in the way: norm, dropout."""

    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, dtype=self.dtype, deterministic=True)(y)
        y = nn.Dense(32, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(16, dtype=self.dtype)(nn.gelu(y)), None


class Transformer(nn.Module):
    """Tied embeddings around blocks: unrolled, rematerialised, or scanned."""

    kind: str = "plain"
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50, 16, dtype=self.dtype)
        x = embed(tokens)
        if self.kind == "scan":
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = stack(self.dtype)(x, None)
        else:
            block = nn.remat(Block) if self.kind == "remat" else Block
            for _ in range(2):
                x, _ = block(self.dtype)(x)
        return embed.attend(x)


class Convnet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x)))
        x = nn.Conv(8, (3, 3), feature_group_count=8)(x)
        x = nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x)
        return nn.Dense(5)(nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2))))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.GRUCell(12))(x)


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance)


SLOW = [
    ("plain", jnp.float32),
    ("plain", jnp.bfloat16),
    ("scan", jnp.float32),
    ("scan", jnp.bfloat16),
    ("remat", jnp.float32),
    ("remat", jnp.bfloat16),
]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [pytest.param(*rest, marks=pytest.mark.slow) for rest in SLOW],
)
def test_linen_transformer(kind, dtype):
    model = Transformer(kind, dtype)
    tokens = jnp.arange(12).reshape(2, 6)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    stacked = quantize.Affine(axes=(0, -1))
    rules = [("embedding$", quantize.Affine(axes=(0,))), ("kernel$", stacked if kind == "scan" else quantize.Affine())]
    small = quantize.convert(variables, rules)
    jax.clear_caches()  # helpers inside jax.numpy that an earlier test has traced would not count again
    with watch() as hits:
        out = jax.jit(compressed(model.apply, strict=True))(small, tokens)
    assert not any(how == "dense" for *_, how in hits)
    layers = 1 if kind == "scan" else 2
    assert hits[("Quantized", "gather", "rule")] == 1
    assert hits[("Quantized", "dot_general", "rule")] == 1 + 6 * layers
    assert out.dtype == dtype
    close(out, model.apply(dense(small), tokens), 2e-5 if dtype == jnp.float32 else 0.05)
    assert nbytes(small) < 0.4 * nbytes(variables)


def test_linen_convolutions_batch_norm_and_dropout(rng):
    model, x = Convnet(), jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    small = quantize.convert(variables, KERNELS_ONLY)
    close(jax.jit(compressed(model.apply, strict=True))(small, x), jax.jit(model.apply)(dense(small), x))
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(1)}, "mutable": ["batch_stats"]}
    out, updates = compressed(lambda v, x: model.apply(v, x, **kwargs))(small, x)
    expected, expected_updates = jax.jit(lambda v, x: model.apply(v, x, **kwargs))(dense(small), x)
    close(out, expected)
    jax.tree.map(close, updates, expected_updates)


KERNELS_ONLY = {"kernel$": quantize.Affine()}


@pytest.mark.slow
def test_linen_recurrent_cell(rng):
    model, x = Recurrent(), jnp.asarray(rng.normal(size=(2, 5, 7)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    small = quantize.convert(variables, KERNELS_ONLY)
    close(jax.jit(compressed(model.apply, strict=True))(small, x), jax.jit(model.apply)(dense(small), x))


@pytest.mark.slow
def test_sparse_linen_model(rng):
    model, x = Convnet(), jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    names = [name for name, _ in named_leaves(variables)]
    leaves = [
        Sparse.from_dense(w, jnp.asarray(rng.random(w.shape) < 0.2)) if name.endswith("kernel") else w
        for name, (_, w) in zip(names, named_leaves(variables), strict=True)
    ]
    small = jax.tree.unflatten(jax.tree.structure(variables), leaves)
    close(jax.jit(compressed(model.apply, strict=True))(small, x), jax.jit(model.apply)(dense(small), x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, tokens):
        x = self.attention(self.embed(tokens))
        return self.out(self.dropout(self.norm(x)))


def test_nnx_module():
    model = NnxNet(nnx.Rngs(0))
    model.eval()
    tokens = jnp.arange(12).reshape(2, 6)
    apply, params, rest = jaxcompress.nnx.functional(model)
    small = quantize.convert(params, KERNELS)
    with watch() as hits:
        out, _ = jax.jit(compressed(apply, strict=True))(small, rest, tokens)
    assert hits[("Quantized", "dot_general", "rule")] == 5
    close(out, jax.jit(apply)(dense(small), rest, tokens)[0])
    close(model(tokens), jax.jit(apply)(params, rest, tokens)[0])


def test_nnx_training_state_comes_back():
    model = NnxNet(nnx.Rngs(0))
    apply, params, rest = jaxcompress.nnx.functional(model)
    before = np.asarray(model.norm.mean[...])
    _, updated = apply(params, rest, jnp.arange(12).reshape(2, 6))
    assert not np.allclose(updated["norm"]["mean"], before)
    np.testing.assert_array_equal(model.norm.mean[...], before)  # the module that was taken apart is as it was


def test_nnx_state_keeps_its_structure_where_a_module_sows():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 3, rngs=rngs)
            self.calls = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.calls[...] += 1
            y = self.dense(x)
            self.sow(nnx.Intermediate, "y", y)
            return y

    x, model = jnp.ones((2, 3)), Net(nnx.Rngs(0))
    with pytest.warns(DeprecationWarning):
        model(x)  # sown before, and kept there
    apply, params, rest = jaxcompress.nnx.functional(model)
    assert set(rest) == {"calls"} and len(model.y.get_value()) == 1
    end, _ = jax.lax.scan(lambda rest, x: apply(params, rest, x)[::-1], rest, jnp.stack([x] * 3))
    assert float(end["calls"]) == 4
    (_, end), found = jaxcompress.nnx.capture(model, "dense$")(params, end, x)
    assert float(end["calls"]) == 5 and set(found) == {"dense"}


def test_vmap_over_models(rng):
    """Members of an ensemble stacked along a leading axis, compressed each by itself."""
    w = jnp.asarray(rng.normal(size=(3, 6, 5)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    small = quantize.quantize(w, quantize.Affine(axes=(0, -1)))
    out = jax.jit(jax.vmap(compressed(lambda w, x: x @ w, strict=True), in_axes=(0, None)))(small, x)
    close(out, jnp.einsum("eio,bi->ebo", small.materialise(), x))
