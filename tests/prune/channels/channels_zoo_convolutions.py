"""Models of images: VGG to ConvNeXt. Batch norm is written out as it runs at inference."""

import jax
import jax.numpy as jnp
from channels_models import Maker, batch_norm, conv, images, layer_norm, model, pool, relu
from jax import lax


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
