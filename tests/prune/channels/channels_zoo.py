"""Small models of the architectures that people prune: `ZOO[name]() -> (fn, params, inputs)`.

Plain functions here; Flax models are in `channels_flax.py`. Batch norm is written out as it runs at inference.
"""

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


@model
def mlp():
    m = Maker()
    p = {"a": m(5, 8), "ab": m(8), "b": m(8, 6), "bb": m(6), "c": m(6, 3), "cb": m(3)}

    def fn(p, x):
        h = relu(x @ p["a"] + p["ab"])
        return jax.nn.sigmoid(h @ p["b"] + p["bb"]) @ p["c"] + p["cb"]

    return fn, p, (jnp.ones((4, 5)) * jnp.arange(1, 5)[:, None],)


@model
def vgg():
    m = Maker()
    p = {"c1": m.conv(3, 6), "n1": m.norm(6), "c2": m.conv(6, 8), "n2": m.norm(8), "d": m(4 * 4 * 8, 6), "h": m(6, 3)}

    def fn(p, x):
        x = relu(batch_norm(p["n1"], conv(x, p["c1"])))
        x = relu(batch_norm(p["n2"], conv(x, p["c2"])))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return relu(x.reshape(x.shape[0], -1) @ p["d"]) @ p["h"]

    return fn, p, images()


def _resnet(kind):
    m = Maker()
    wide = 8 if kind != "v2" else 4
    p = {"stem": m.conv(3, 4), "n0": m.norm(4), "head": m(wide, 3)}
    p |= {"c1": m.conv(4, 6), "n1": m.norm(6), "c2": m.conv(6, wide), "n2": m.norm(wide)}
    p |= {"c3": m.conv(wide, 5), "n3": m.norm(5), "c4": m.conv(5, wide), "n4": m.norm(wide)}
    if kind == "projection":
        p["short"] = m.conv(4, 8, 1)

    def v1(p, x):
        x = relu(batch_norm(p["n0"], conv(x, p["stem"])))
        h = relu(batch_norm(p["n1"], conv(x, p["c1"], 2)))
        h = batch_norm(p["n2"], conv(h, p["c2"]))
        short = (
            conv(x, p["short"], 2)
            if kind == "projection"
            else jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
        )
        x = relu(h + short)
        h = relu(batch_norm(p["n3"], conv(x, p["c3"])))
        return pool(relu(x + batch_norm(p["n4"], conv(h, p["c4"])))) @ p["head"]

    def v2(p, x):
        x = conv(x, p["stem"])
        x = x + conv(relu(batch_norm(p["n1"], conv(relu(batch_norm(p["n0"], x)), p["c1"]))), p["c2"])
        x = x + conv(relu(batch_norm(p["n3"], conv(relu(batch_norm(p["n2"], x)), p["c3"]))), p["c4"])
        return pool(relu(batch_norm(p["n4"], x))) @ p["head"]

    return (v2 if kind == "v2" else v1), p, images()


@model
def resnet_projection():
    return _resnet("projection")


@model
def resnet_option_a():
    return _resnet("option_a")


@model
def resnet_v2():
    return _resnet("v2")


@model
def resnext():
    m = Maker()
    p = {"stem": m.conv(3, 6), "c1": m.conv(6, 8, 1), "n1": m.norm(8), "c2": m.conv(8, 12, groups=4), "n2": m.norm(12)}
    p |= {"c3": m.conv(12, 6, 1), "head": m(6, 3)}

    def fn(p, x):
        x = relu(conv(x, p["stem"]))
        h = relu(batch_norm(p["n1"], conv(x, p["c1"])))
        h = relu(batch_norm(p["n2"], conv(h, p["c2"], groups=4)))
        return pool(relu(x + conv(h, p["c3"]))) @ p["head"]

    return fn, p, images()


@model
def densenet():
    m = Maker()
    p = {"stem": m.conv(3, 4), "n1": m.norm(4), "c1": m.conv(4, 3), "n2": m.norm(7), "c2": m.conv(7, 3)}
    p |= {"n3": m.norm(10), "t": m.conv(10, 5, 1), "head": m(5, 3)}

    def fn(p, x):
        x = conv(x, p["stem"])
        x = jnp.concatenate([x, conv(relu(batch_norm(p["n1"], x)), p["c1"])], -1)
        x = jnp.concatenate([x, conv(relu(batch_norm(p["n2"], x)), p["c2"])], -1)
        x = conv(relu(batch_norm(p["n3"], x)), p["t"])
        return pool(relu(x)) @ p["head"]

    return fn, p, images()


def _mobilenet(excite, multiplier=1):
    m = Maker()
    wide = 6 * multiplier
    p = {"stem": m.conv(3, 4), "up": m.conv(4, 6, 1), "n1": m.norm(6), "deep": m.conv(6, wide, groups=6)}
    p |= {"n2": m.norm(wide), "down": m.conv(wide, 4, 1), "n3": m.norm(4), "head": m(4, 3)}
    p |= {"squeeze": m(wide, 4), "excite": m(4, wide)} if excite else {}

    def fn(p, x):
        x = conv(x, p["stem"])
        h = batch_norm(p["n1"], conv(x, p["up"]))
        h = jax.nn.hard_swish(h) if excite else jax.nn.relu6(h)
        h = batch_norm(p["n2"], conv(h, p["deep"], groups=6))
        h = jax.nn.hard_swish(h) if excite else jax.nn.relu6(h)
        if excite:
            gate = relu(pool(h) @ p["squeeze"]) @ p["excite"]
            h = h * jax.nn.hard_sigmoid(gate)[:, None, None, :]
        return pool(relu(x + batch_norm(p["n3"], conv(h, p["down"])))) @ p["head"]

    return fn, p, images()


@model
def mobilenet_v2():
    return _mobilenet(False)


@model
def mobilenet_v3():
    return _mobilenet(True)


@model
def depthwise_multiplier():
    return _mobilenet(False, 2)


@model
def shufflenet():
    m = Maker()
    p = {"stem": m.conv(3, 8), "head": m(8, 3)}
    for i in range(2):
        p[f"a{i}"], p[f"d{i}"], p[f"b{i}"] = m.conv(4, 6, 1), m.conv(6, 6, groups=6), m.conv(6, 4, 1)

    def fn(p, x):
        x = relu(conv(x, p["stem"]))
        for i in range(2):
            kept, h = jnp.split(x, 2, -1)
            h = conv(conv(relu(conv(h, p[f"a{i}"])), p[f"d{i}"], groups=6), p[f"b{i}"])
            x = jnp.concatenate([kept, relu(h)], -1)
            shape = x.shape
            x = x.reshape(*shape[:-1], 2, shape[-1] // 2).swapaxes(-1, -2).reshape(shape)
        return pool(x) @ p["head"]

    return fn, p, images()


@model
def unet_group_norm():
    m = Maker()
    p = {"down": m.conv(3, 6), "g1": m(6, positive=True), "b1": m(6), "mid": m.conv(6, 8), "g2": m(8, positive=True)}
    p |= {"b2": m(8), "up": m.conv(8, 6), "last": m.conv(12, 4), "out": m.conv(4, 2, 1)}

    def group_norm(x, scale, bias, groups):
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, groups, c // groups)
        mean = x.mean((1, 2, 4), keepdims=True)
        var = (x * x).mean((1, 2, 4), keepdims=True) - mean**2
        return ((x - mean) * lax.rsqrt(var + 1e-3)).reshape(b, h, w, c) * scale + bias

    def fn(p, x):
        skip = jax.nn.silu(group_norm(conv(x, p["down"]), p["g1"], p["b1"], 3))
        h = jax.nn.silu(group_norm(conv(skip, p["mid"], 2), p["g2"], p["b2"], 4))
        h = jnp.repeat(jnp.repeat(h, 2, 1), 2, 2)
        h = jnp.concatenate([skip, conv(h, p["up"])], -1)
        return conv(relu(conv(h, p["last"])), p["out"])

    return fn, p, images()


@model
def pixel_shuffle():
    m = Maker()
    p = {"a": m.conv(3, 6), "b": m.conv(6, 5 * 4), "c": m.conv(5, 3)}

    def fn(p, x):
        x = conv(relu(conv(x, p["a"])), p["b"])
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)
        return conv(relu(x), p["c"])

    return fn, p, images(n=4)


@model
def transposed_conv():
    m = Maker()
    p = {"a": m.conv(3, 6), "b": m.conv(6, 5), "c": m.conv(5, 2)}

    def fn(p, x):
        x = lax.conv_transpose(relu(conv(x, p["a"])), p["b"], (2, 2), "SAME")
        return conv(relu(x), p["c"])

    return fn, p, images(n=4)


@model
def convnext():
    m = Maker()
    p = {"stem": m(4, 4, 3, 6), "deep": m.conv(6, 6, groups=6), "up": m(6, 12), "down": m(12, 6), "gamma": m(6)}
    p |= {"n": {"scale": m(6, positive=True), "bias": m(6)}, "head": m(6, 3)}

    def fn(p, x):
        x = conv(x, p["stem"], 4, padding="VALID")
        h = layer_norm(p["n"], conv(x, p["deep"], groups=6))
        x = x + p["gamma"] * (jax.nn.gelu(h @ p["up"]) @ p["down"])
        return pool(x) @ p["head"]

    return fn, p, images()


def heads(x, n):
    return x.reshape(*x.shape[:-1], n, x.shape[-1] // n)


def attend(q, k, v, causal=False):
    """[batch, time, heads, width] each."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -1e9)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)
    return out.reshape(*out.shape[:2], -1)


def _block(m, d=6, inner=8, wide=10):
    return {
        "qkv": m(d, 3 * inner),
        "qkv_bias": m(3 * inner),
        "o": m(inner, d),
        "up": m(d, wide),
        "up_bias": m(wide),
        "down": m(wide, d),
        "n1": {"scale": m(d, positive=True), "bias": m(d)},
        "n2": {"scale": m(d, positive=True), "bias": m(d)},
    }


def _transformer_block(p, x, post=False, n=2, causal=False):
    def attention(h):
        q, k, v = jnp.split(h @ p["qkv"] + p["qkv_bias"], 3, -1)
        return attend(heads(q, n), heads(k, n), heads(v, n), causal) @ p["o"]

    def feed_forward(h):
        return jax.nn.gelu(h @ p["up"] + p["up_bias"]) @ p["down"]

    if post:
        x = layer_norm(p["n1"], x + attention(x))
        return layer_norm(p["n2"], x + feed_forward(x))
    x = x + attention(layer_norm(p["n1"], x))
    return x + feed_forward(layer_norm(p["n2"], x))


@model
def vit():
    m = Maker()
    p = {"patch": m(4, 4, 3, 6), "cls": m(1, 1, 6), "pos": m(1, 5, 6), "block": _block(m), "head": m(6, 3)}

    def fn(p, x):
        x = conv(x, p["patch"], 4, padding="VALID")
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = jnp.concatenate([jnp.broadcast_to(p["cls"], (x.shape[0], 1, x.shape[-1])), x], 1) + p["pos"]
        return _transformer_block(p["block"], x)[:, 0] @ p["head"]

    return fn, p, images()


@model
def swin():
    m = Maker()
    p = {"patch": m(2, 2, 3, 6), "block": _block(m), "bias": m(2, 4, 4), "merge": m(24, 8), "head": m(8, 3)}

    def windows(x, n):
        b, h, w, c = x.shape
        return x.reshape(b, h // n, n, w // n, n, c).transpose(0, 1, 3, 2, 4, 5).reshape(-1, n * n, c)

    def fn(p, x):
        x = conv(x, p["patch"], 2, padding="VALID")
        b, h, w, c = x.shape
        q = p["block"]
        y = windows(jnp.roll(layer_norm(q["n1"], x), (-1, -1), (1, 2)), 2)
        qh, kh, vh = (heads(z, 2) for z in jnp.split(y @ q["qkv"] + q["qkv_bias"], 3, -1))
        logits = jnp.einsum("bqhd,bkhd->bhqk", qh, kh) / 2 + p["bias"]
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), vh).reshape(y.shape[0], 4, -1) @ q["o"]
        y = y.reshape(b, h // 2, w // 2, 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + jnp.roll(y, (1, 1), (1, 2))
        x = x + jax.nn.gelu(layer_norm(q["n2"], x) @ q["up"]) @ q["down"]
        x = jnp.concatenate([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1) @ p["merge"]
        return pool(x) @ p["head"]

    return fn, p, images()


@model
def transformer_pre_norm_tied():
    m = Maker()
    p = {"embed": m(7, 6), "pos": m(5, 6), "blocks": [_block(m), _block(m)], "n": {"scale": m(6), "bias": m(6)}}

    def fn(p, x):
        h = p["embed"][x] + p["pos"]
        for block in p["blocks"]:
            h = _transformer_block(block, h, causal=True)
        return layer_norm(p["n"], h) @ p["embed"].T

    return fn, p, words()


@model
def transformer_post_norm():
    m = Maker()
    p = {"embed": m(7, 6), "block": _block(m), "head": m(6, 3)}

    def fn(p, x):
        return _transformer_block(p["block"], p["embed"][x], post=True).mean(1) @ p["head"]

    return fn, p, words()


def rotate(x, first=0):
    """Rotary positions, on halves."""
    t, d = x.shape[1], x.shape[-1]
    angles = (first + jnp.arange(t))[:, None] * 10.0 ** -jnp.arange(d // 2)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def rotate_pairs(x):
    t, d = x.shape[1], x.shape[-1]
    angles = jnp.arange(t)[:, None] * 10.0 ** -jnp.arange(d // 2)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


def _llama(m, d=6, q_heads=4, kv_heads=2, width=4, wide=7):
    return {
        "n1": m(d, positive=True),
        "q": m(d, q_heads * width),
        "k": m(d, kv_heads * width),
        "v": m(d, kv_heads * width),
        "o": m(q_heads * width, d),
        "n2": m(d, positive=True),
        "gate": m(d, wide),
        "up": m(d, wide),
        "down": m(wide, d),
    }


def _llama_block(p, x, q_heads=4, kv_heads=2, turn=rotate):
    h = rms_norm(p["n1"], x)
    q, k, v = heads(h @ p["q"], q_heads), heads(h @ p["k"], kv_heads), heads(h @ p["v"], kv_heads)
    q, k = turn(q), turn(k)
    k, v = (jnp.repeat(z, q_heads // kv_heads, 2) for z in (k, v))
    x = x + attend(q, k, v, True) @ p["o"]
    h = rms_norm(p["n2"], x)
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def _lm(turn):
    m = Maker()
    p = {"embed": m(7, 6), "block": _llama(m), "n": m(6, positive=True), "head": m(6, 7)}

    def fn(p, x):
        return rms_norm(p["n"], _llama_block(p["block"], p["embed"][x], turn=turn)) @ p["head"]

    return fn, p, words()


@model
def rotary_gqa():
    return _lm(rotate)


@model
def rotary_pairs_gqa():
    return _lm(rotate_pairs)


@model
def gqa_scanned_remat():
    m = Maker()
    blocks = [_llama(m) for _ in range(3)]
    p = {"embed": m(7, 6), "blocks": jax.tree.map(lambda *xs: jnp.stack(xs), *blocks), "head": m(6, 7)}

    def fn(p, x):
        step = jax.checkpoint(lambda h, block: (_llama_block(block, h), None))
        return lax.scan(step, p["embed"][x], p["blocks"])[0] @ p["head"]

    return fn, p, words()


@model
def gqa_stacked_weights():
    m = Maker()
    blocks = [_llama(m) for _ in range(2)]
    p = {"embed": m(7, 6), "blocks": jax.tree.map(lambda *xs: jnp.stack(xs), *blocks), "head": m(6, 7)}

    def fn(p, x):
        h = p["embed"][x]
        for i in range(2):
            h = _llama_block(jax.tree.map(lambda w, i=i: w[i], p["blocks"]), h)
        return h @ p["head"]

    return fn, p, words()


@model
def kv_cache_decode():
    """One step of decoding; the cache has heads and widths, so it is part of the tree that is cut."""
    m = Maker()
    p = {"embed": m(7, 6), "block": _llama(m), "head": m(6, 7), "cache": {"k": m(2, 8, 2, 4), "v": m(2, 8, 2, 4)}}

    def fn(p, x, at):
        b, h = p["block"], p["embed"][x]
        q, k, v = heads(h @ b["q"], 4), heads(h @ b["k"], 2), heads(h @ b["v"], 2)
        k, v = (lax.dynamic_update_slice(p["cache"][n], z, (0, at, 0, 0)) for n, z in (("k", k), ("v", v)))
        q = q.reshape(*q.shape[:2], 2, 2, 4)
        logits = jnp.einsum("bqgrd,bkgd->bgrqk", q, k) / 2
        logits = jnp.where(jnp.arange(8) <= at, logits, -1e9)
        out = jnp.einsum("bgrqk,bkgd->bqgrd", jax.nn.softmax(logits), v)
        return (h + out.reshape(*out.shape[:2], -1) @ b["o"]) @ p["head"]

    return fn, p, (words(t=1)[0], jnp.int32(3))


@model
def mixture_of_experts():
    m = Maker()
    p = {"a": m(6, 8), "router": m(8, 4), "up": m(4, 8, 10), "down": m(4, 10, 8), "head": m(8, 3)}

    def fn(p, x):
        x = jnp.tanh(x @ p["a"])
        gates, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
        dispatch = jnp.sum(jax.nn.one_hot(chosen, 4) * gates[..., None], -2)
        h = relu(jnp.einsum("btd,edf->btef", x, p["up"]))
        y = jnp.einsum("btef,efd,bte->btd", h, p["down"], dispatch)
        sparse = jnp.einsum("btd,btdf->btf", x, p["up"][chosen[..., 0]])
        return (x + y + jnp.einsum("btf,btfd->btd", relu(sparse), p["down"][chosen[..., 0]])).mean(1) @ p["head"]

    return fn, p, tokens()


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
