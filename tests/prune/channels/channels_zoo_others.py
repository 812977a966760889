"""Models that neither attend nor convolve images: dense, recurrent, state-space, graphs, control flow."""

import jax
import jax.numpy as jnp
import numpy as np
from channels_models import Maker, model, relu, tokens
from jax import lax


@model
def mlp():
    m = Maker()
    p = {"a": m(5, 8), "ab": m(8), "b": m(8, 6), "bb": m(6), "c": m(6, 3), "cb": m(3)}

    def fn(p, x):
        h = relu(x @ p["a"] + p["ab"])
        return jax.nn.sigmoid(h @ p["b"] + p["bb"]) @ p["c"] + p["cb"]

    return fn, p, (jnp.ones((4, 5)) * jnp.arange(1, 5)[:, None],)


def _recurrent(gates, step):
    m = Maker()
    p = {"x": m(6, gates * 5), "h": m(5, gates * 5), "b": m(gates * 5), "head": m(5, 3)}

    def fn(p, x):
        zeros = jnp.zeros((x.shape[0], 5))
        carry = (zeros, zeros) if gates == 4 else zeros
        carry, hs = lax.scan(lambda c, x: step(p, c, x), carry, x.swapaxes(0, 1))
        return (hs.mean(0) + (carry[0] if gates == 4 else carry)) @ p["head"]

    return fn, p, tokens()


@model
def lstm():
    def step(p, carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ p["x"] + h @ p["h"] + p["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return _recurrent(4, step)


@model
def gru():
    def step(p, h, x):
        xr, xz, xn = jnp.split(x @ p["x"] + p["b"], 3, -1)
        hr, hz, hn = jnp.split(h @ p["h"], 3, -1)
        r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
        h = (1 - z) * jnp.tanh(xn + r * hn) + z * h
        return h, h

    return _recurrent(3, step)


@model
def state_space():
    """A selective state-space block: an input-dependent diagonal recurrence, a short convolution and a gate."""
    m = Maker()
    p = {"in": m(6, 16), "conv": m(3, 1, 8), "a": m(8, 4), "bc": m(8, 8), "dt": m(8, 8), "d": m(8), "out": m(8, 6)}

    def fn(p, x):
        h, gate = jnp.split(x @ p["in"], 2, -1)
        numbers = ("NWC", "WIO", "NWC")
        h = lax.conv_general_dilated(h, p["conv"], (1,), [(2, 0)], dimension_numbers=numbers, feature_group_count=8)
        h = jax.nn.silu(h)
        b, c = jnp.split(h @ p["bc"], 2, -1)
        dt = jax.nn.softplus(h @ p["dt"])
        decay = jnp.exp(dt[..., None] * -jnp.exp(p["a"]))
        drive = (dt * h)[..., None] * b[:, :, None, :]

        def step(s, xs):
            decay, drive, c = xs
            s = decay * s + drive
            return s, jnp.einsum("bdn,bn->bd", s, c)

        moved = [z.swapaxes(0, 1) for z in (decay, drive, c)]
        _, ys = lax.scan(step, jnp.zeros((x.shape[0], 8, 4)), moved)
        return ((ys.swapaxes(0, 1) + p["d"] * h) * jax.nn.silu(gate)) @ p["out"]

    return fn, p, tokens()


@model
def lora():
    m = Maker()
    p = {"w1": m(6, 8), "a1": m(6, 4), "b1": m(4, 8), "w2": m(8, 3), "a2": m(8, 4), "b2": m(4, 3)}

    def fn(p, x):
        h = relu(x @ p["w1"] + 0.5 * (x @ p["a1"]) @ p["b1"])
        return h @ p["w2"] + h @ (p["a2"] @ p["b2"] * 0.5)

    return fn, p, tokens()


@model
def graph_network():
    m = Maker()
    p = {"a": m(6, 8), "edge": m(16, 7), "node": m(15, 5), "head": m(5, 3)}
    senders, receivers = np.array([0, 1, 2, 3, 4, 0]), np.array([1, 2, 3, 4, 0, 2])

    def fn(p, x, senders, receivers):
        h = relu(x @ p["a"])
        edges = relu(jnp.concatenate([h[senders], h[receivers]], -1) @ p["edge"])
        gathered = jax.ops.segment_sum(edges, receivers, 5)
        return relu(jnp.concatenate([h, gathered], -1) @ p["node"]).mean(0) @ p["head"]

    return fn, p, (tokens()[0][0], jnp.asarray(senders), jnp.asarray(receivers))


@model
def control_flow():
    """cond, while, fori, switch, a custom_vjp and a custom_jvp, a jitted helper used twice."""
    m = Maker()
    p = {"a": m(6, 8), "b": m(8, 8), "c": m(8, 7), "d": m(8, 7), "e": m(7, 3)}

    @jax.custom_vjp
    def scaled(x, w):
        return x @ w

    scaled.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (2 * g @ r[1].T, 0.5 * jnp.einsum("bi,bo->io", r[0], g)))

    @jax.custom_jvp
    def bent(x):
        return jnp.tanh(x)

    bent.defjvp(lambda primals, tangents: (bent(primals[0]), 3 * tangents[0] * bent(primals[0])))
    helper = jax.jit(lambda x: jnp.sin(x) * x)

    def fn(p, x):
        x = x.mean(1)
        h = bent(x @ p["a"])
        h = lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p["b"] + i * h), h)
        h = lax.cond(x.sum() > 0, lambda h: h * 2, lambda h: jnp.sin(h), h)
        h = helper(helper(h))
        y = lax.switch(jnp.int32(x.shape[0] > 1), [lambda h: h @ p["c"], lambda h: scaled(h, p["d"])], h)
        return jax.checkpoint(lambda y: relu(y) * y)(y) @ p["e"]

    return fn, p, tokens()


@model
def while_loop():
    m = Maker()
    p = {"a": m(6, 8), "b": m(8, 8), "c": m(8, 3)}

    def fn(p, x):
        h = jnp.tanh(x @ p["a"])

        def body(c):
            return c[0] + 1, jnp.tanh(c[1] @ p["b"])

        _, turned = lax.while_loop(lambda c: c[0] < 3, body, (0, lax.stop_gradient(h)))
        return (h + lax.stop_gradient(turned)) @ p["c"]

    def forward_only(p, x):
        return fn(lax.stop_gradient(p), x)

    return forward_only, p, tokens()


@model
def dropout_and_statistics():
    """Batch norm with the batch's statistics, and dropout: the same bits are dropped."""
    m = Maker()
    p = {"a": m(6, 8), "scale": m(8, positive=True), "bias": m(8), "b": m(8, 3)}

    def fn(p, x, key):
        h = x @ p["a"]
        mean, square = h.mean((0, 1)), (h * h).mean((0, 1))
        h = (h - mean) * lax.rsqrt(square - mean**2 + 1e-3) * p["scale"] + p["bias"]
        h = jnp.where(jax.random.bernoulli(key, 0.7, h.shape), relu(h) / 0.7, 0)
        return h @ p["b"]

    return fn, p, (*tokens(), jax.random.key(3))


@model
def permuted_selected():
    """Static permutation, selection, reversal and tiling of channels, patches to channels and back."""
    m = Maker()
    order = np.array([3, 1, 0, 2, 5, 4, 7, 6])
    p = {"a": m(6, 8), "b": m(16, 8), "c": m(4, 6), "d": m(12, 3)}

    def fn(p, x):
        h = jnp.tanh(x @ p["a"])[..., order]
        h = jnp.tanh(jnp.tile(h, (1, 1, 2)) @ p["b"])[..., ::-1]
        h = relu(h[..., ::2] @ p["c"])
        return jnp.concatenate([h, h], -1) @ p["d"]

    return fn, p, tokens()


@model
def weight_standardised():
    m = Maker()
    p = {"a": m(6, 8), "g": m(8, positive=True), "b": m(8, 3)}

    def fn(p, x):
        w = p["a"] * p["g"] * lax.rsqrt((p["a"] ** 2).sum(0) + 1e-3)
        return jnp.tanh(x @ w) @ p["b"]

    return fn, p, tokens()
