"""More operations of random programs: those that few models have, so that every rule is met."""

import jax
import jax.numpy as jnp
import numpy as np
from channels_ops import op
from jax import P, lax


@op
def cosine(m, c, values):
    """Not zero where units are."""
    return c, lambda p, x, vs: jnp.cos(x)


@op
def channel_sum(m, c, values):
    return c, lambda p, x, vs: x + 0.1 * x.sum(-1, keepdims=True)


@op
def barrier(m, c, values):
    return c, lambda p, x, vs: lax.optimization_barrier(x)


@op
def rounded(m, c, values):
    return c, lambda p, x, vs: lax.reduce_precision(x, 8, 20)


@op
def powers(m, c, values):
    y = int(m.rng.choice([-2, 2, 3]))
    return c, lambda p, x, vs: lax.integer_pow(x if y > 0 else 2 + jnp.cos(x), y)


@op
def bits(m, c, values):
    def run(p, x, vs):
        signs = lax.bitcast_convert_type(lax.bitcast_convert_type(jnp.sign(x), jnp.int32), jnp.float32)
        return x * signs

    return c, run


@op
def half_bits(m, c, values):
    """Two numbers of each: axes stay whole."""
    return c, lambda p, x, vs: lax.bitcast_convert_type(jnp.sign(x), jnp.uint16).astype(jnp.float32).sum(-1) / 1e5


@op
def clipped(m, c, values):
    low = float(m.rng.choice([-0.5, 0.1]))
    return c, lambda p, x, vs: lax.clamp(low, x, 0.7)


@op
def bounded(m, c, values):
    bound = float(m.rng.choice([-0.3, 0.0, 0.2]))
    return c, lambda p, x, vs: jnp.maximum(jnp.minimum(x, 0.6), bound)


@op
def of_two(m, c, values):
    f = m.rng.choice([lambda x: jnp.arctan2(x, 2.0), lambda x: jnp.power(1 + jnp.abs(x), 0.7), lambda x: x % 0.9])
    return c, lambda p, x, vs: f(x)


@op
def complex_numbers(m, c, values):
    return c, lambda p, x, vs: jnp.abs(lax.complex(x, jnp.cos(x)) * (1 + 2j))


@op
def sliced_at_a_constant(m, c, values):
    if c < 4:
        return None
    return c - 1, lambda p, x, vs: lax.dynamic_slice(x, (0, 0, 1), (*x.shape[:2], c - 1))


def _computed(p, w):
    """0 or 1, known only when it runs."""
    return (p[w][0] > 0).astype(jnp.int32)


@op
def sliced_at_a_computed_place(m, c, values):
    w, axis = m(2), int(m.rng.integers(1, 3))

    def run(p, x, vs):
        n = x.shape[axis] - 1
        part = lax.dynamic_slice_in_dim(x, _computed(p, w), n, axis)
        return jnp.concatenate([part, part[(slice(None),) * axis + (slice(0, 1),)]], axis)

    return c, run


@op
def written_into_channels(m, c, values):
    w = m(2)
    return c, lambda p, x, vs: lax.dynamic_update_slice(x, jnp.sin(x[..., :-1]), (0, 0, _computed(p, w)))


@op
def largest(m, c, values):
    def over_time(p, x, vs):
        return lax.top_k(x.swapaxes(1, 2), x.shape[1])[0].swapaxes(1, 2)

    return c, over_time if m.rng.random() < 0.6 else lambda p, x, vs: lax.top_k(x, c)[0]


@op
def sorted_channels(m, c, values):
    return c, lambda p, x, vs: jnp.sort(x, -1)


@op
def fourier(m, c, values):
    def over_time(p, x, vs):
        return jnp.fft.fft(x.swapaxes(1, 2)).real.swapaxes(1, 2)

    return c, over_time if m.rng.random() < 0.6 else lambda p, x, vs: jnp.fft.fft(x).real


@op
def extrema(m, c, values):
    f, axis = m.rng.choice([jnp.min, jnp.max, jnp.prod]), int(m.rng.integers(1, 3))
    if m.rng.integers(2):
        return c, lambda p, x, vs: x + f(0.5 + jnp.sin(x), axis, keepdims=True)
    return c, lambda p, x, vs: jnp.broadcast_to(f(x, 1, keepdims=True), x.shape)


@op
def accumulated(m, c, values):
    f = m.rng.choice([lax.cumprod, lax.cummax, lax.cummin, lax.cumlogsumexp])
    axis = int(m.rng.integers(1, 3))
    return c, lambda p, x, vs: f(x, axis)


@op
def window_sum(m, c, values):
    window = (1, 3, 1) if m.rng.random() < 0.6 else (1, 1, 3)
    return c, lambda p, x, vs: lax.reduce_window(x, 0.0, lax.add, window, (1, 1, 1), "SAME")


@op
def pooling_gradient(m, c, values):
    window, alone = (1, 2, 1) if m.rng.random() < 0.6 else (1, 1, 2), bool(m.rng.integers(2))

    def run(p, x, vs):
        y, back = jax.vjp(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, window, (1, 1, 1), "SAME"), x)
        return back(y)[0] + (0 if alone else x)

    return c, run


@op
def scattered_otherwise(m, c, values):
    how, to = str(m.rng.choice(["set", "mul", "max", "min"])), np.array([1, 3])
    return c, lambda p, x, vs: getattr(jnp.sin(x).at[:, to], how)(x[:, :2], unique_indices=True)


@op
def scattered_channels(m, c, values):
    """At places known while tracing, or not until they are computed."""
    to, w = np.array([1, 0]), None if m.rng.random() < 0.5 else m(2)
    return c, lambda p, x, vs: x.at[..., to if w is None else to + _computed(p, w)].add(jnp.sin(x[..., :2]))


@op
def looked_up_by_channel(m, c, values):
    """Each channel takes times of its own, and adds to others."""
    at = m.rng.permuted(np.tile(np.arange(4), (c, 1)), axis=1).T

    def one(column, places):  # [time]
        return column[places].at[places[::-1]].add(column)

    w = m(2)
    return c, lambda p, x, vs: jax.vmap(jax.vmap(one, (1, 1), 1), (0, None))(x, at[::-1] * (1 - _computed(p, w)))


@op
def edges(m, c, values):
    low, high, inside = (int(n) for n in m.rng.choice([(-1, 1, 0), (1, -1, 0), (0, 0, 1), (-1, 2, 0)]))
    size = c + low + high + (c - 1) * inside
    return None if size > 20 else (size, lambda p, x, vs: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 0), (low, high, inside))))


@op
def drawn(m, c, values):
    """Noise from a key that is known only when it runs."""
    w = m(2)

    def run(p, x, vs):
        one, other = jax.random.split(jax.random.key(_computed(p, w)))
        bits = jax.random.bits(other, x.shape, "uint8").astype(jnp.float32) / 255
        return x * jax.random.uniform(jax.random.fold_in(one, 3), x.shape) + bits

    return c, run


@op
def batch_grouped_conv(m, c, values):
    w = m(3, c, 6)
    numbers = ("NWC", "WIO", "NWC")

    def run(p, x, vs):
        y = lax.conv_general_dilated(x, p[w], (1,), "SAME", dimension_numbers=numbers, batch_group_count=2)
        return jnp.broadcast_to(y, (2, *y.shape[1:]))

    return 6, run


@op
def turned_while(m, c, values):
    w, residual = m(c, c), bool(m.rng.integers(2))

    def run(p, x, vs):
        still, kernel = lax.stop_gradient(x), lax.stop_gradient(p[w])
        turned = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ kernel)), (0, still))[1]
        return x + turned if residual else turned

    return c, run


@jax.custom_jvp
def _bent(x, w):
    return jnp.tanh(x @ w)


@_bent.defjvp
def _bent_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    y = _bent(x, w)
    return y, (1 - y * y) * (2 * dx @ w + x @ dw)


@op
def own_jvp(m, c, values):
    w = m(c, 6)
    return 6, lambda p, x, vs: _bent(x, p[w])


@jax.custom_vjp
def _scaled(x, w):
    return x @ w


_scaled.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (2 * g @ r[1].T, 0.5 * jnp.einsum("btc,btd->cd", r[0], g)))


@op
def own_vjp(m, c, values):
    w = m(c, 6)
    return 6, lambda p, x, vs: _scaled(x, p[w])


def _sharded(body, in_specs, out_specs, **more):
    mesh = jax.make_mesh((2,), ("s",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **more)


@op
def sharded_dense(m, c, values):
    """Columns, then rows of the next kernel on each device, with sums over the mesh."""
    a, b = m(c, 8), m(8, 6)

    def body(a, b, x):
        h = jax.nn.relu(x @ a)
        h = h + lax.ppermute(h, "s", [(0, 1), (1, 0)]) * jnp.where(lax.axis_index("s") == 0, 1.0, 0.5)
        return lax.psum(h @ b, "s")

    specs = (P(None, "s"), P("s"), P())
    return 6, lambda p, x, vs: _sharded(body, specs, P())(p[a], p[b], x)


@op
def sharded_channels(m, c, values):
    """Channels are gathered, multiplied, and scattered again."""
    if c % 2:
        return None
    w, g, summed = m(c, 8), m(8), bool(m.rng.integers(2))

    def body(w, g, x):
        h = lax.all_gather(x, "s", axis=2, tiled=True)
        if summed:  # then what was dropped is not zero, and no gain hides it
            return lax.psum_scatter(h @ w + 0.1 * h.sum(-1, keepdims=True), "s", scatter_dimension=2, tiled=True)
        return lax.psum_scatter(h @ w, "s", scatter_dimension=2, tiled=True) * g

    specs = (P(), P("s"), P(None, None, "s"))
    return 8, lambda p, x, vs: _sharded(body, specs, P(None, None, "s"))(p[w], p[g], x)


@op
def sharded_exchange(m, c, values):
    """Time on each device becomes channels on each device, and back."""
    if c % 2:
        return None
    g, bare = m(c), bool(m.rng.integers(2))

    def body(g, x):
        h = lax.all_to_all(x, "s", 2, 1, tiled=True)
        h = h if bare else h * g
        h = lax.all_to_all(jnp.tanh(h), "s", 1, 2, tiled=True)
        return lax.all_to_all(h, "s", 2, 2, tiled=True)

    return c, lambda p, x, vs: _sharded(body, (P("s"), P(None, "s")), P(None, "s"))(p[g], x)
