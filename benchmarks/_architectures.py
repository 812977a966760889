"""Well-known networks as plain functions, `(fn, params as shapes, input)`, for benchmarks of channels.

Batch norm is written as it runs at inference; initial values are of no interest here, so `random_like` fills shapes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Model = tuple[Callable[..., Any], Any, jax.ShapeDtypeStruct]


def random_like(shapes: Any, seed: int = 0) -> Any:
    """Arrays of the given shapes that keep a network's values in range."""
    rng = np.random.default_rng(seed)

    def of(s: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = max(1, int(np.prod(s.shape[:-1])))
        spread = 1 / np.sqrt(fan_in) if len(s.shape) > 1 else 0.1
        return jnp.asarray(rng.normal(size=s.shape, scale=spread) + (len(s.shape) == 1), s.dtype)

    return jax.tree.map(of, shapes)


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _conv(x: jax.Array, w: jax.Array, stride: int = 1, groups: int = 1, padding: str = "SAME") -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def _norm(c: int) -> Any:
    return {name: _f32(c) for name in ("scale", "bias", "mean", "var")}


def _batch_norm(p: Any, x: jax.Array) -> jax.Array:
    return (x - p["mean"]) * lax.rsqrt(jnp.abs(p["var"]) + 1e-5) * p["scale"] + p["bias"]


def _layer_norm(p: Any, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt((x * x).mean(-1, keepdims=True) - mean**2 + 1e-5) * p["scale"] + p["bias"]


def resnet50(batch: int = 1, size: int = 224) -> Model:
    """ResNet-50 (He et al. 2016)."""
    p: dict[str, Any] = {"stem": _f32(7, 7, 3, 64), "n": _norm(64), "head": _f32(2048, 1000)}
    plan, wide = [], 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for i in range(blocks):
            name, narrow = f"s{stage}b{i}", 64 * 2**stage
            p[name] = {"c1": _f32(1, 1, wide, narrow), "c2": _f32(3, 3, narrow, narrow)}
            p[name] |= {"c3": _f32(1, 1, narrow, 4 * narrow), "n1": _norm(narrow), "n2": _norm(narrow)}
            p[name]["n3"] = _norm(4 * narrow)
            if i == 0:
                p[name] |= {"short": _f32(1, 1, wide, 4 * narrow), "n": _norm(4 * narrow)}
            plan.append((name, 2 if i == 0 and stage else 1))
            wide = 4 * narrow

    def fn(p: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(_batch_norm(p["n"], _conv(x, p["stem"], 2)))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for name, stride in plan:
            b = p[name]
            h = jax.nn.relu(_batch_norm(b["n1"], _conv(x, b["c1"])))
            h = jax.nn.relu(_batch_norm(b["n2"], _conv(h, b["c2"], stride)))
            short = _batch_norm(b["n"], _conv(x, b["short"], stride)) if "short" in b else x
            x = jax.nn.relu(_batch_norm(b["n3"], _conv(h, b["c3"])) + short)
        return x.mean((1, 2)) @ p["head"]

    return fn, p, _f32(batch, size, size, 3)


def mobilenet_v2(batch: int = 1, size: int = 224) -> Model:
    """MobileNetV2 (Sandler et al. 2018)."""
    p: dict[str, Any] = {"stem": _f32(3, 3, 3, 32), "n": _norm(32)}
    plan, wide = [], 32
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for s, (expand, out, blocks, stride) in enumerate(stages):
        for i in range(blocks):
            name, inner = f"s{s}b{i}", expand * wide
            p[name] = {"deep": _f32(3, 3, 1, inner), "down": _f32(1, 1, inner, out), "n2": _norm(inner)}
            p[name]["n3"] = _norm(out)
            if expand > 1:
                p[name] |= {"up": _f32(1, 1, wide, inner), "n1": _norm(inner)}
            plan.append((name, stride if i == 0 else 1, inner, i > 0))
            wide = out
    p |= {"last": _f32(1, 1, wide, 1280), "nl": _norm(1280), "head": _f32(1280, 1000)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.relu6(_batch_norm(p["n"], _conv(x, p["stem"], 2)))
        for name, stride, inner, adds in plan:
            b = p[name]
            h = jax.nn.relu6(_batch_norm(b["n1"], _conv(x, b["up"]))) if "up" in b else x
            h = jax.nn.relu6(_batch_norm(b["n2"], _conv(h, b["deep"], stride, inner)))
            h = _batch_norm(b["n3"], _conv(h, b["down"]))
            x = x + h if adds else h
        return jax.nn.relu6(_batch_norm(p["nl"], _conv(x, p["last"]))).mean((1, 2)) @ p["head"]

    return fn, p, _f32(batch, size, size, 3)


def vit_b(batch: int = 1, size: int = 224, layers: int = 12, d: int = 768, heads: int = 12) -> Model:
    """ViT-B/16 (Dosovitskiy et al. 2021)."""
    norm = {"scale": _f32(d), "bias": _f32(d)}
    block = {"qkv": _f32(d, 3 * d), "qkv_bias": _f32(3 * d), "o": _f32(d, d), "o_bias": _f32(d), "n1": norm, "n2": norm}
    block |= {"up": _f32(d, 4 * d), "up_bias": _f32(4 * d), "down": _f32(4 * d, d), "down_bias": _f32(d)}
    patches = (size // 16) ** 2
    p = {"patch": _f32(16, 16, 3, d), "cls": _f32(1, 1, d), "pos": _f32(1, patches + 1, d), "n": norm}
    p |= {"head": _f32(d, 1000), **{f"b{i}": dict(block) for i in range(layers)}}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        x = _conv(x, p["patch"], 16, padding="VALID")
        x = x.reshape(x.shape[0], -1, d)
        x = jnp.concatenate([jnp.broadcast_to(p["cls"], (x.shape[0], 1, d)), x], 1) + p["pos"]
        for i in range(layers):
            b = p[f"b{i}"]
            q, k, v = jnp.split(_layer_norm(b["n1"], x) @ b["qkv"] + b["qkv_bias"], 3, -1)
            q, k, v = (z.reshape(*z.shape[:2], heads, d // heads) for z in (q, k, v))
            a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(d // heads))
            x = x + jnp.einsum("bhqk,bkhd->bqhd", a, v).reshape(x.shape) @ b["o"] + b["o_bias"]
            h = jax.nn.gelu(_layer_norm(b["n2"], x) @ b["up"] + b["up_bias"])
            x = x + h @ b["down"] + b["down_bias"]
        return _layer_norm(p["n"], x)[:, 0] @ p["head"]

    return fn, p, _f32(batch, size, size, 3)


def llama(
    batch: int = 1,
    time: int = 128,
    layers: int = 32,
    d: int = 4096,
    q_heads: int = 32,
    kv_heads: int = 8,
    wide: int = 14336,
    vocabulary: int = 128256,
    dtype: Any = jnp.bfloat16,
) -> Model:
    """A decoder with rotary positions and grouped queries, its layers written out; by default 8B parameters."""
    width = d // q_heads

    def s(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    block = {"n1": s(d), "q": s(d, d), "k": s(d, kv_heads * width), "v": s(d, kv_heads * width), "o": s(d, d)}
    block |= {"n2": s(d), "gate": s(d, wide), "up": s(d, wide), "down": s(wide, d)}
    p = {
        "embed": s(vocabulary, d),
        "n": s(d),
        "head": s(d, vocabulary),
        **{f"b{i}": dict(block) for i in range(layers)},
    }

    def rms_norm(g: jax.Array, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        return (y * lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)).astype(dtype) * g

    def turn(x: jax.Array) -> jax.Array:
        angles = jnp.arange(x.shape[1])[:, None] * 5e5 ** -(jnp.arange(width // 2) * 2 / width)
        sin, cos = jnp.sin(angles)[:, None].astype(dtype), jnp.cos(angles)[:, None].astype(dtype)
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def fn(p: Any, tokens: jax.Array) -> jax.Array:
        x = p["embed"][tokens]
        b, t = tokens.shape
        mask = jnp.tril(jnp.ones((t, t), bool))
        for i in range(layers):
            w = p[f"b{i}"]
            h = rms_norm(w["n1"], x)
            q = turn((h @ w["q"]).reshape(b, t, q_heads, width)).reshape(b, t, kv_heads, q_heads // kv_heads, width)
            k, v = turn((h @ w["k"]).reshape(b, t, kv_heads, width)), (h @ w["v"]).reshape(b, t, kv_heads, width)
            logits = jnp.einsum("bqgrd,bkgd->bgrqk", q, k) / np.sqrt(width).astype(dtype)
            a = jax.nn.softmax(jnp.where(mask, logits, -1e9).astype(jnp.float32)).astype(dtype)
            x = x + jnp.einsum("bgrqk,bkgd->bqgrd", a, v).reshape(b, t, d) @ w["o"]
            h = rms_norm(w["n2"], x)
            x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        return rms_norm(p["n"], x) @ p["head"]

    return fn, p, jax.ShapeDtypeStruct((batch, time), jnp.int32)
