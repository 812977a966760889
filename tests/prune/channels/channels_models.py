"""What the models of the zoo are made of: random parameters, layers as functions, inputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ZOO = {}


def model(build):
    ZOO[build.__name__] = build
    return build


class Maker:
    """Random parameters, one after the other, never near zero."""

    def __init__(self, seed=0):
        self.rng, self.numbers = np.random.default_rng(seed), itertools.count()

    def __call__(self, *shape, positive=False):
        x = self.rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[:-1])))
        x = np.abs(x) + 0.5 if positive else x + 0.1 * np.sign(x)
        return jnp.asarray(x, jnp.float32)

    def norm(self, c):
        return {
            "scale": self(c, positive=True),
            "bias": self(c),
            "mean": self(c),
            "var": self(c, positive=True),
        }

    def conv(self, i, o, k=3, groups=1):
        return self(k, k, i // groups, o)


def conv(x, w, stride=1, groups=1, padding="SAME"):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def batch_norm(p, x):
    return (x - p["mean"]) * lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]


def layer_norm(p, x):
    mean = x.mean(-1, keepdims=True)
    var = (x * x).mean(-1, keepdims=True) - mean**2
    return (x - mean) * lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]


def rms_norm(scale, x):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def images(c=3, n=8, batch=2):
    return (jnp.asarray(np.random.default_rng(9).normal(size=(batch, n, n, c)), jnp.float32),)


def tokens(d=6, t=5, batch=2):
    return (jnp.asarray(np.random.default_rng(9).normal(size=(batch, t, d)), jnp.float32),)


def words(vocab=7, t=5, batch=2):
    return (jnp.asarray(np.random.default_rng(9).integers(0, vocab, (batch, t)), jnp.int32),)


relu, pool = jax.nn.relu, lambda x: x.mean((1, 2))


def heads(x, n):
    return x.reshape(*x.shape[:-1], n, x.shape[-1] // n)


def attend(q, k, v, causal=False):
    """[batch, time, heads, width] each."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -1e9)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)
    return out.reshape(*out.shape[:2], -1)
