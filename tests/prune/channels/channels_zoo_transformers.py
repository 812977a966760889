"""Models of sequences that attend: vision, language, grouped queries, caches, experts."""

import jax
import jax.numpy as jnp
from channels_models import Maker, attend, conv, heads, images, layer_norm, model, pool, relu, rms_norm, tokens, words
from jax import lax


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
