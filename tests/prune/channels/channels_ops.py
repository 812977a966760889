"""Operations of random programs, on values [batch, time, channels]: those that models are made of."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

OPS = {}


def op(build):
    """`build(m, x, others)` returns `(new channels, run)`, or None where it doesn't fit.

    `m` makes parameters; `x` is the number of channels; `run(p, x, values)` computes.
    """
    OPS[build.__name__.strip("_")] = build
    return build


class Maker:
    def __init__(self, rng):
        self.rng, self.params = rng, {}

    def __call__(self, *shape):
        name = f"p{len(self.params)}"
        x = self.rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[:-1])))
        self.params[name] = np.asarray(x + 0.1 * np.sign(x), np.float32)  # cut and zeroed without compilation
        return name


def _conv(x, w, groups=1):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups)


@op
def dense(m, c, values):
    n = int(m.rng.choice([4, 6, 8]))
    w = m(c, n)
    return n, lambda p, x, vs: x @ p[w]


@op
def dense_transposed(m, c, values):
    w = m(8, c)
    return 8, lambda p, x, vs: jnp.einsum("btc,oc->bto", x, p[w])


@op
def bias(m, c, values):
    b = m(c)
    return c, lambda p, x, vs: x + p[b]


@op
def gain(m, c, values):
    g = m(c)
    return c, lambda p, x, vs: x * p[g]


@op
def activation(m, c, values):
    f = m.rng.choice(
        [jax.nn.relu, jnp.tanh, jax.nn.sigmoid, jax.nn.gelu, jax.nn.silu, jnp.cos, jax.nn.softplus, jax.nn.leaky_relu]
    )
    return c, lambda p, x, vs: f(x)


@op
def residual(m, c, values):
    same = [i for i, n in enumerate(values) if n == c]
    if not same:
        return None
    i = int(m.rng.choice(same))
    return c, lambda p, x, vs: x + vs[i]


@op
def gate(m, c, values):
    same = [i for i, n in enumerate(values) if n == c]
    if not same:
        return None
    i = int(m.rng.choice(same))
    return c, lambda p, x, vs: x * jnp.tanh(vs[i])


@op
def concat(m, c, values):
    i = int(m.rng.integers(len(values)))
    return None if c + values[i] > 16 else (c + values[i], lambda p, x, vs: jnp.concatenate([x, vs[i]], -1))


@op
def split_product(m, c, values):
    if c % 2:
        return None
    return c // 2, lambda p, x, vs: jnp.multiply(*jnp.split(x, 2, -1))


@op
def split_part(m, c, values):
    if c < 6:
        return None
    i = int(m.rng.integers(2))
    return c // 2, lambda p, x, vs: x[..., i * (c - c // 2) : i * (c - c // 2) + c // 2]


@op
def every_other(m, c, values):
    if c < 4 or c % 2:
        return None
    i = int(m.rng.integers(2))
    return c // 2, lambda p, x, vs: x[..., i::2]


@op
def reverse(m, c, values):
    return c, lambda p, x, vs: x[..., ::-1]


@op
def permutation(m, c, values):
    order = m.rng.permutation(c)
    return c, lambda p, x, vs: x[..., order]


@op
def selection(m, c, values):
    some = np.sort(m.rng.choice(c, max(2, c - 2), replace=False))
    return len(some), lambda p, x, vs: jnp.take(x, some, axis=-1)


@op
def roll(m, c, values):
    n = int(m.rng.integers(1, c))
    return c, lambda p, x, vs: jnp.roll(x, n, -1)


@op
def pad(m, c, values):
    a, b = (int(n) for n in m.rng.integers(0, 3, 2))
    return c + a + b, lambda p, x, vs: jnp.pad(x, ((0, 0), (0, 0), (a, b)))


@op
def tile(m, c, values):
    return None if c > 6 else (2 * c, lambda p, x, vs: jnp.tile(x, (1, 1, 2)))


@op
def repeat(m, c, values):
    return None if c > 6 else (2 * c, lambda p, x, vs: jnp.repeat(x, 2, -1))


@op
def shuffle(m, c, values):
    if c % 2:
        return None
    return c, lambda p, x, vs: lax.reshape(x.reshape(*x.shape[:-1], 2, c // 2), x.shape, (0, 1, 3, 2))


@op
def group_conv(m, c, values):
    if c % 2:
        return None
    w = m(3, c // 2, 8)
    return 8, lambda p, x, vs: _conv(x, p[w], 2)


@op
def depthwise(m, c, values):
    n = int(m.rng.integers(1, 3))
    w = m(3, 1, c * n)
    return c * n, lambda p, x, vs: _conv(x, p[w], c)


@op
def plain_conv(m, c, values):
    w = m(int(m.rng.choice([1, 3])), c, 6)
    return 6, lambda p, x, vs: _conv(x, p[w])


@op
def rms_norm(m, c, values):
    g = m(c)
    return c, lambda p, x, vs: x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-2) * p[g]


@op
def layer_norm_two_pass(m, c, values):
    g = m(c)
    return c, lambda p, x, vs: (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-2) * p[g]


@op
def group_norm(m, c, values):
    if c % 2:
        return None
    g = m(c)

    def run(p, x, vs):
        y = x.reshape(*x.shape[:-1], 2, c // 2)
        y = y * lax.rsqrt((y * y).mean((1, 3), keepdims=True) + 1e-2)
        return y.reshape(x.shape) * p[g]

    return c, run


@op
def batch_statistics(m, c, values):
    g = m(c)
    return c, lambda p, x, vs: (x - x.mean((0, 1))) * lax.rsqrt(x.var((0, 1)) + 1e-2) * p[g]


@op
def softmax_time(m, c, values):
    return c, lambda p, x, vs: jax.nn.softmax(x, 1)


@op
def softmax_channels(m, c, values):
    return c, lambda p, x, vs: jax.nn.softmax(x, -1)


@op
def sum_normalised(m, c, values):
    return c, lambda p, x, vs: jnp.exp(0.3 * x) / jnp.exp(0.3 * x).sum(-1, keepdims=True)


@op
def attention(m, c, values):
    w, o = m(c, 24), m(8, 6)

    def run(p, x, vs):
        q, k, v = (z.reshape(*z.shape[:2], 2, 4) for z in jnp.split(x @ p[w], 3, -1))
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
        return jnp.einsum("bhqk,bkhd->bqhd", a, v).reshape(*x.shape[:2], 8) @ p[o]

    return 6, run


@op
def fused_qkv_by_axis(m, c, values):
    w, o = m(c, 3, 2, 4), m(2, 4, 6)

    def run(p, x, vs):
        q, k, v = jnp.moveaxis(jnp.einsum("btc,cnhd->btnhd", x, p[w]), 2, 0)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bhqk,bkhd,hdo->bqo", a, v, p[o])

    return 6, run


@op
def grouped_query(m, c, values):
    q, k, v = m(c, 16), m(c, 8), m(c, 8)

    def run(p, x, vs):
        b, t = x.shape[:2]
        qs = (x @ p[q]).reshape(b, t, 2, 2, 4)
        ks, vs = ((x @ p[w]).reshape(b, t, 2, 4) for w in (k, v))
        a = jax.nn.softmax(jnp.einsum("bqgrd,bkgd->bgrqk", qs, ks))
        return jnp.einsum("bgrqk,bkgd->bqgrd", a, vs).reshape(b, t, 16)

    return 16, run


@op
def recurrence(m, c, values):
    w, u = m(c, 8), m(4, 8)

    def run(p, x, vs):
        def step(h, x):
            a, b = jnp.split(x @ p[w] + h @ p[u], 2, -1)
            h = jax.nn.sigmoid(a) * h + jnp.tanh(b)
            return h, h

        return lax.scan(step, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return 4, run


@op
def stacked_layers(m, c, values):
    w, b = m(2, c, c), m(2, c)
    return c, lambda p, x, vs: lax.scan(lambda h, wb: (jnp.tanh(h @ wb[0] + wb[1]), None), x, (p[w], p[b]))[0]


@op
def stacked_by_index(m, c, values):
    w = m(2, c, c)
    return c, lambda p, x, vs: jnp.tanh(x @ p[w][0]) @ p[w][1]


@op
def loop(m, c, values):
    w = m(c, c)
    return c, lambda p, x, vs: lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p[w]) + i, x)


@op
def branch(m, c, values):
    w, v = m(c, 6), m(c, 6)
    return 6, lambda p, x, vs: lax.cond(x.sum() + 0.37 > 0, lambda x: x @ p[w], lambda x: jnp.sin(x @ p[v]), x)


@op
def remat(m, c, values):
    w = m(c, 6)
    return 6, lambda p, x, vs: jax.checkpoint(lambda x, w: jax.nn.relu(x @ w))(x, p[w])


@op
def experts(m, c, values):
    w, r = m(3, c, 6), m(c, 3)

    def run(p, x, vs):
        best = jnp.argmax(x @ p[r], -1)
        return jnp.einsum("btc,btcd->btd", x, p[w][best]) + jnp.einsum("btc,ecd->btd", x, p[w])

    return 6, run


@op
def outer_product(m, c, values):
    w = m(c, 3)
    return (
        (3 * c, lambda p, x, vs: (x[..., None] * (x @ p[w])[..., None, :]).reshape(*x.shape[:2], -1)) if c < 6 else None
    )


@op
def contracted_with_itself(m, c, values):
    return c, lambda p, x, vs: jnp.einsum("bsc,btc,btd->bsd", x, x, x) / 30


@op
def time_to_channels(m, c, values):
    w = m(4 * c, 6)
    return 6, lambda p, x, vs: jnp.broadcast_to((x.reshape(x.shape[0], 1, -1) @ p[w]), (*x.shape[:2], 6))


@op
def maximum_of_channels(m, c, values):
    return c, lambda p, x, vs: x - x.max(-1, keepdims=True)


@op
def cumulative(m, c, values):
    axis = int(m.rng.integers(1, 3))
    return c, lambda p, x, vs: jnp.cumsum(x, axis)


@op
def sorted_time(m, c, values):
    return c, lambda p, x, vs: jnp.sort(x, 1)


@op
def pooled(m, c, values):
    return c, lambda p, x, vs: lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 1), (1, 1, 1), "SAME")


@op
def scattered(m, c, values):
    to = np.array([1, 0, 3, 1])
    return c, lambda p, x, vs: jnp.zeros_like(x).at[:, to].add(x)


@op
def written(m, c, values):
    t = m(2, 4, c)
    return c, lambda p, x, vs: lax.dynamic_update_slice(p[t] * jnp.ones_like(x), x[:, :1], (0, 2, 0))


@op
def dropped_out(m, c, values):
    return c, lambda p, x, vs: jnp.where(jax.random.bernoulli(jax.random.key(1), 0.7, x.shape), x / 0.7, 0)


@op
def table(m, c, values):
    w = m(5, c)
    return c, lambda p, x, vs: x + p[w][jnp.clip(jnp.int32(lax.stop_gradient(x).sum(-1)), 0, 4)]


@op
def stacked_mean(m, c, values):
    return c, lambda p, x, vs: jnp.stack([x, jnp.sin(x)], 2).mean(2)


@op
def masked_by_constant(m, c, values):
    mask = jnp.asarray(m.rng.integers(0, 2, c), jnp.float32)
    return c, lambda p, x, vs: x * mask
