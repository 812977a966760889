"""Models of Torch-Pruning's structural test scripts, by their names: `MODELS[name]() -> (fn, params)`, on `IMAGES`."""

import jax
import jax.numpy as jnp
import numpy as np
from channels_models import Maker, conv, pool, relu

IMAGES = jnp.asarray(np.random.default_rng(4).normal(size=(2, 6, 6, 3)), jnp.float32)
MODELS = {}


def model(build):
    MODELS[build.__name__] = build
    return build


def chain():
    """Two convolutions; a unit is a filter of the first."""
    m = Maker()
    params = {"a": m.conv(3, 8), "bias": m(8), "b": m.conv(8, 2)}
    return lambda p, x: conv(relu(conv(x, p["a"]) + p["bias"]), p["b"]), params


@model
def backward():
    """Its gradient is compared too, as in all of these."""
    m = Maker()
    return lambda p, x: pool(relu(conv(relu(conv(x, p["a"])), p["b"]))) @ p["c"], {
        "a": m.conv(3, 6),
        "b": m.conv(6, 5),
        "c": m(5, 2),
    }


@model
def concat():
    m = Maker()
    p = {"a": m.conv(3, 4), "b": m.conv(3, 5), "c": m.conv(9, 4), "d": m(4, 2)}
    return lambda p, x: pool(conv(jnp.concatenate([conv(x, p["a"]), conv(x, p["b"])], -1), p["c"])) @ p["d"], p


@model
def cascaded_concat():
    m = Maker()
    p = {"a": m.conv(3, 4), "b": m.conv(4, 3), "c": m.conv(7, 2), "d": m(9, 2)}

    def fn(p, x):
        a = conv(x, p["a"])
        ab = jnp.concatenate([a, relu(conv(a, p["b"]))], -1)
        return pool(relu(jnp.concatenate([conv(ab, p["c"]), ab], -1))) @ p["d"]

    return fn, p


@model
def concat_split():
    m = Maker()
    p = {"a": m.conv(3, 4), "b": m.conv(3, 4), "c": m.conv(6, 4), "d": m.conv(2, 4), "e": m(8, 2)}

    def fn(p, x):
        x = jnp.concatenate([conv(x, p["a"]), conv(x, p["b"])], -1)
        u, v = jnp.split(x, [6], -1)
        return pool(jnp.concatenate([conv(relu(u), p["c"]), conv(relu(v), p["d"])], -1)) @ p["e"]

    return fn, p


@model
def split():
    m = Maker()
    p = {"a": m.conv(3, 9), "b": m.conv(3, 4), "c": m.conv(3, 4), "d": m.conv(3, 4), "e": m(4, 2)}

    def fn(p, x):
        parts = jnp.split(relu(conv(x, p["a"])), 3, -1)
        return pool(sum(conv(y, p[k]) for y, k in zip(parts, "bcd", strict=True))) @ p["e"]

    return fn, p


@model
def non_feature_dim_cat():
    m = Maker()
    p = {"a": m.conv(3, 4), "b": m.conv(3, 4), "c": m.conv(4, 3), "d": m(3, 2)}
    return lambda p, x: pool(conv(jnp.concatenate([conv(x, p["a"]), conv(x, p["b"])], 1), p["c"])) @ p["d"], p


@model
def reshape():
    m = Maker()
    p = {"a": m.conv(3, 4), "b": m(4 * 36, 5), "c": m(5, 2)}
    return lambda p, x: relu(conv(x, p["a"]).reshape(2, -1) @ p["b"]) @ p["c"], p


@model
def multiple_inputs_and_outputs():
    m = Maker()
    p = {"a": m.conv(3, 4), "b": m.conv(3, 4), "c": m.conv(4, 4), "d": m(4, 2), "e": m(4, 3)}

    def fn(p, x):
        h = relu(conv(x, p["a"]) + conv(jnp.flip(x, 1), p["b"]))
        return pool(h) @ p["d"], {"more": pool(conv(h, p["c"])) @ p["e"]}

    return fn, p


@model
def single_channel_output():
    m = Maker()
    p = {"a": m.conv(3, 4), "b": m.conv(4, 1), "c": m.conv(1, 4), "d": m(4, 2)}
    return lambda p, x: pool(relu(conv(conv(relu(conv(x, p["a"])), p["b"]), p["c"]))) @ p["d"], p


@model
def unwrapped_parameters():
    m = Maker()
    p = {"a": m.conv(3, 4), "gain": m(1, 1, 1, 4), "token": m(4), "b": m(4, 2)}
    return lambda p, x: (pool(relu(conv(x, p["a"]) * p["gain"])) + jnp.tanh(p["token"])) @ p["b"], p


@model
def unused_parameters():
    m = Maker()
    p = {"a": m.conv(3, 4), "b": m(4, 2), "unused": m(4, 4)}
    return lambda p, x: pool(relu(conv(x, p["a"]))) @ p["b"], p


@model
def dependency_lenet():
    m = Maker()
    p = {"a": m.conv(3, 4), "b": m.conv(4, 5), "c": m(5 * 9, 6), "d": m(6, 2)}

    def fn(p, x):
        x = relu(conv(relu(conv(x, p["a"])), p["b"]))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return relu(x.reshape(x.shape[0], -1) @ p["c"]) @ p["d"]

    return fn, p
