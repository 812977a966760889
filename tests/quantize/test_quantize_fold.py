"""Folding and bias correction: against closed forms, in models that nobody edited."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress.nnx
from jaxcompress import factorize, quantize
from jaxcompress.arrays import compressed, dense
from jaxcompress.quantize import Affine


class Net(nn.Module):
    scaled: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        def norm():
            return nn.BatchNorm(use_running_average=not train, use_scale=self.scaled)

        x = nn.relu(norm()(nn.Conv(6, (3, 3))(x)))
        y = nn.relu(norm()(nn.Conv(6, (3, 3), use_bias=False, feature_group_count=2)(x)))
        y = nn.Conv(6, (1, 1), name="used_twice")(y)
        x = norm()(y) + y  # what follows the convolution is not one chain
        x = norm()(nn.Dense(5)(x.mean((1, 2))))
        return nn.Dense(3, name="head")(nn.relu(x))


def varied(variables, rng):
    """Statistics and scales as training leaves them, and one channel that is switched off."""

    def leaf(path, x):
        name = path[-1].key
        x = jnp.asarray(rng.uniform(0.3, 3, x.shape) if name in ("var", "scale") else rng.normal(size=x.shape), x.dtype)
        return x.at[1].set(0) if name == "scale" else x

    return jax.tree_util.tree_map_with_path(leaf, variables)


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [True, False])
def test_the_same_function_with_norms_that_only_shift(scaled, rng):
    model, x = Net(scaled), jnp.asarray(rng.normal(size=(2, 5, 5, 4)), jnp.float32)
    variables = varied(jax.jit(model.init)(jax.random.key(0), x), rng)
    out = quantize.fold(model.apply, variables, x)
    assert jax.tree.structure(out) == jax.tree.structure(variables)
    np.testing.assert_allclose(model.apply(out, x), model.apply(variables, x), rtol=1e-4, atol=1e-4)
    for kernel, norm, folded in [
        ("Conv_0", 0, True),
        ("Conv_1", 1, True),
        ("used_twice", 2, False),
        ("Dense_0", 3, True),
    ]:
        old, new = variables["params"], out["params"]
        before, after = (tree["batch_stats"][f"BatchNorm_{norm}"] for tree in (variables, out))
        factor = 1 / np.sqrt(np.asarray(before["var"]) + 1e-5)
        left = 1 / np.sqrt(np.asarray(after["var"]) + 1e-5)
        if scaled:
            factor = factor * old[f"BatchNorm_{norm}"]["scale"]
            left = left * new[f"BatchNorm_{norm}"]["scale"]
        expected = old[kernel]["kernel"] * factor if folded else old[kernel]["kernel"]
        np.testing.assert_allclose(new[kernel]["kernel"], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(left, 1 if folded else factor, rtol=1e-4)


@pytest.mark.slow
def test_nnx_and_plain_functions(rng):
    class Small(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.norm = nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return jax.nn.relu(self.norm(self.conv(x)))

    model, x = Small(nnx.Rngs(0)), jnp.asarray(rng.normal(size=(2, 4, 4, 2)), jnp.float32)
    model.eval()
    apply, params, rest = jaxcompress.nnx.functional(model)
    params["norm"]["scale"] = jnp.asarray([2.0, 0.5, 1.0, 3.0])

    def fn(both, x):
        return apply(both["params"], both["rest"], x)[0]

    both = {"params": params, "rest": rest}
    out = quantize.fold(fn, both, x)
    np.testing.assert_allclose(
        out["params"]["conv"]["kernel"],
        params["conv"]["kernel"] * params["norm"]["scale"] / np.sqrt(1 + 1e-5),
        rtol=1e-4,
    )
    np.testing.assert_allclose(fn(out, x), fn(both, x), rtol=1e-4, atol=1e-5)

    plain = {"w": jnp.ones((3, 2)), "b": jnp.asarray([1.0, 2.0]), "gain": jnp.asarray([4.0, 5.0])}
    folded = quantize.fold(
        lambda p, x: jnp.tanh(jax.jit(lambda y: p["gain"] * (p["b"] - y))(x @ p["w"])),
        plain,
        x[0, 0, :, :1].repeat(3, 1),
    )
    np.testing.assert_allclose(folded["w"], [[-4.0, -5.0]] * 3)
    np.testing.assert_allclose(folded["gain"], [-1.0, -1.0])
    np.testing.assert_allclose(folded["b"], [-4.0, -10.0])


class Mixed(nn.Module):
    """Parameters in one precision, products in another."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.BatchNorm(use_running_average=True, **kinds)(nn.Conv(6, (3, 3), **kinds)(x))
        return nn.Dense(3, **kinds)(nn.relu(x).mean((1, 2)))


@pytest.mark.parametrize("dtypes", [(jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16)], ids=["mixed", "all"])
def test_folding_and_bias_correction_in_half_precision(dtypes, rng):
    model, x = Mixed(*dtypes), jnp.asarray(rng.normal(size=(2, 5, 5, 4)), jnp.float32)
    variables = varied(model.init(jax.random.key(0), x), rng)
    out = quantize.fold(model.apply, variables, x)
    norm, seen = variables["params"]["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"]
    factor = np.asarray(norm["scale"], np.float64) / np.sqrt(np.asarray(seen["var"], np.float64) + 1e-5)
    precise = dtypes[1] == jnp.float32
    kernels = [np.asarray(tree["params"]["Conv_0"]["kernel"], np.float64) for tree in (variables, out)]
    np.testing.assert_allclose(kernels[1], kernels[0] * factor, rtol=1e-5 if precise else 2e-2)
    # what the norm still scales by is 1, as near as its dtype comes
    left = np.asarray(out["params"]["BatchNorm_0"]["scale"], np.float64) / np.sqrt(seen["var"] + 1e-5)
    np.testing.assert_allclose(left, 1, rtol=1e-5 if precise else 1e-2)

    small = quantize.convert(variables, {"kernel$": Affine(3)})
    found = quantize.correct_biases(model.apply, variables, small, [x])["params"]
    assert float(jnp.max(jnp.abs(found["BatchNorm_0"]["bias"] - norm["bias"]))) > 1e-3
    assert float(jnp.max(jnp.abs(found["Dense_0"]["bias"] - variables["params"]["Dense_0"]["bias"]))) > 1e-3


def test_layers_that_are_rematerialised(rng):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(6)(x)))

    class Net(nn.Module):
        block: type

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="out")(self.block(name="block")(x))

    model, x = Net(nn.remat(Block)), jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    variables = varied(model.init(jax.random.key(0), x), rng)
    folded = [quantize.fold(net.apply, variables, x) for net in (model, Net(Block))]
    jax.tree.map(np.testing.assert_array_equal, *folded)
    small = quantize.convert(variables, {"kernel$": Affine(2)})
    biases = [quantize.correct_biases(net.apply, variables, small, [x]) for net in (model, Net(Block))]
    jax.tree.map(np.testing.assert_array_equal, *biases)


LAYERS = {
    "outputs first": lambda x, w, b: x @ w.T + b,
    "weight in front": lambda x, w, b: w @ x.T + b[:, None],
    "vmapped": lambda x, w, b: jax.vmap(lambda x: w @ x + b)(x),
}


@pytest.mark.parametrize("name", LAYERS)
def test_bias_correction_wherever_the_kernel_stands(name, rng):
    w, b = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), jnp.asarray(rng.normal(size=6), jnp.float32)
    x = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)  # as many examples as outputs
    rules = {"w": Affine(2, axes=())}
    small = quantize.convert({"w": w, "b": b}, rules)
    found = quantize.correct_biases(lambda p, x: LAYERS[name](x, p["w"], p["b"]), {"w": w, "b": b}, small, [x])
    np.testing.assert_allclose(found["b"] - b, (w - dense(small["w"])) @ x.mean(0), rtol=1e-4, atol=1e-5)


def test_what_is_added_to_places_is_no_bias(rng):
    """As many places as channels: shapes do not tell them apart."""
    params = {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "places": jnp.arange(4.0)}
    x = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    small = quantize.convert(params, {"w": Affine(2)})
    with pytest.raises(ValueError, match="no compressed weight has a bias"):
        quantize.correct_biases(lambda p, x: x @ p["w"] + p["places"][:, None], params, small, [x])


@pytest.mark.parametrize("gain", ["channels", "one number"])
def test_a_flipped_kernel_with_a_scale_behind_the_norms_shift(gain, rng):
    """As `ConvTranspose` with `transpose_kernel`, and a scale of the layer; fake quantization folds both as well."""

    def model(p, x):
        numbers = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_transpose(x, p["w"], (2,), "SAME", dimension_numbers=numbers, transpose_kernel=True)
        y = (y + p["b"] - p["mean"]) * (jax.lax.rsqrt(p["var"] + 1e-5) * p["scale"]) + p["shift"]
        return jnp.tanh(y * p["gain"])

    params = {name: rng.normal(size=6) for name in ("b", "mean", "scale", "shift")}
    params |= {"w": rng.normal(size=(3, 6, 4)), "var": rng.uniform(0.3, 3, 6)}
    params["gain"] = rng.uniform(0.5, 2, 6 if gain == "channels" else 1)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    x = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    out = quantize.fold(model, params, x)
    np.testing.assert_allclose(model(out, x), model(params, x), rtol=1e-4, atol=1e-5)
    factor = params["scale"] / np.sqrt(params["var"] + 1e-5) * (params["gain"] if gain == "channels" else 1)
    np.testing.assert_allclose(out["w"], params["w"] * factor[:, None], rtol=1e-4)
    rules = {"^w$": Affine(4, axes=())}
    trained = quantize.fake(model, rules, fold=True)(params, x)
    np.testing.assert_allclose(trained, compressed(model)(quantize.convert(out, rules), x), rtol=1e-4, atol=1e-5)


def test_nothing_to_fold(rng):
    model, x = Net(), jnp.asarray(rng.normal(size=(2, 5, 5, 4)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    with pytest.raises(ValueError, match="running averages"):  # statistics of the batch depend on the data
        quantize.fold(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[0], variables, x)
    with pytest.raises(ValueError, match="nothing to fold"):
        quantize.fold(lambda p, x: jax.nn.relu(x @ p) * 2, jnp.ones((4, 3)), jnp.ones((2, 4)))


def test_bias_correction_is_the_mean_inputs_times_the_error(rng):
    """Closed form: `b + mean(x) (w - w')`; then the layer's mean output is the float model's."""
    x = [jnp.asarray(rng.normal(loc=1, size=(8, 6)), jnp.float32) for _ in range(3)]
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), "b": jnp.ones(4)}

    def fn(p, x):
        return jnp.tanh(x @ p["w"] + p["b"])

    small = quantize.convert(params, {"w": Affine(3)})
    out = quantize.correct_biases(fn, params, small, x)
    mean = np.concatenate(x).mean(0)
    np.testing.assert_allclose(out["b"], 1 + mean @ np.asarray(params["w"] - small["w"].materialise()), rtol=1e-4)
    assert out["w"] is small["w"]


@pytest.mark.slow
def test_bias_correction_of_convolutions_and_norms(rng):
    """Where the bias stands before or behind a norm's scale; and inputs on a static grid count too."""
    model, x = Net(), jnp.asarray(rng.normal(loc=0.5, size=(8, 5, 5, 4)), jnp.float32)
    variables = varied(jax.jit(model.init)(jax.random.key(0), x), rng)
    rules = {"kernel$": Affine(3, axes=(), activation_bits=4)}
    ranges = quantize.input_ranges(model.apply, variables, [x], rules)
    small = quantize.static(quantize.convert(variables, rules), ranges)
    out = quantize.correct_biases(model.apply, variables, small, [x])
    changed = {
        "/".join(str(k.key) for k in path[1:])
        for (path, a), (_, b) in zip(
            jax.tree_util.tree_leaves_with_path(dense(out)),
            jax.tree_util.tree_leaves_with_path(dense(small)),
            strict=True,
        )
        if not np.array_equal(a, b)
    }
    assert changed == {"BatchNorm_0/bias", "BatchNorm_1/bias", "used_twice/bias", "BatchNorm_3/bias", "head/bias"}

    def first(v, x):  # the first layer alone: its mean output is the float model's
        return nn.BatchNorm(use_running_average=True).apply(
            {"params": v["params"]["BatchNorm_0"], "batch_stats": v["batch_stats"]["BatchNorm_0"]},
            nn.Conv(6, (3, 3)).apply({"params": v["params"]["Conv_0"]}, x),
        )

    wanted, got, uncorrected = (np.mean(compressed(first)(tree, x), axis=(0, 1, 2)) for tree in (variables, out, small))
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert np.max(np.abs(uncorrected - wanted)) > 1e-2


def test_what_is_compressed_already_stays(rng):
    """A compressed leaf is several arrays: those behind it in the tree are still found by their own names."""

    def fn(p, x):
        y = (jax.nn.relu(x @ p["a"]) @ p["b"] + p["bias"]) * p["scale"]
        return jax.nn.relu(y) @ p["c"] + p["d"]

    shapes = {"a": (6, 8), "b": (8, 7), "bias": (7,), "c": (7, 3), "d": (3,), "scale": (7,)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(20, 6)), jnp.float32)
    part = factorize.convert(params, {"^a$": factorize.Svd(rank=2)})
    folded, wanted = quantize.fold(fn, part, x), quantize.fold(fn, dense(part), x)
    assert type(folded["a"]) is type(part["a"])
    np.testing.assert_array_equal(folded["b"], wanted["b"])
    small = quantize.convert(part, {"^[bc]$": Affine(2)})
    corrected = quantize.correct_biases(fn, part, small, [x])
    wanted = quantize.correct_biases(fn, dense(part), {**small, "a": dense(part["a"])}, [x])
    for name in ("bias", "d"):
        np.testing.assert_allclose(corrected[name], wanted[name], atol=1e-6)
        assert np.any(np.asarray(corrected[name]) != small[name])


def test_bias_correction_refuses(rng):
    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((2, 3))

    def fn(p, x):
        return x @ p["w"]

    small = quantize.convert(params, {"w": Affine(4)})
    with pytest.raises(ValueError, match="no compressed weight has a bias"):
        quantize.correct_biases(fn, params, small, [x])
    with pytest.raises(ValueError, match="no batches"):
        quantize.correct_biases(fn, params, small, [])
    with pytest.raises(ValueError, match="other leaves"):
        quantize.correct_biases(fn, params, {"v": small["w"]}, [x])
    params = params | {"b": jnp.ones(2)}
    with pytest.raises(ValueError, match="'b' is to be corrected, and is compressed itself"):
        quantize.correct_biases(lambda p, x: fn(p, x) + p["b"], params, quantize.convert(params, {"": Affine(4)}), [x])


def test_a_model_in_half_precision_has_its_roundings_tolerance(rng):
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(32, dtype="bfloat16", param_dtype="bfloat16")(x)
            return nn.Dense(8, dtype="bfloat16", param_dtype="bfloat16")(
                nn.BatchNorm(use_running_average=True, dtype="bfloat16")(x)
            )

    x = jnp.asarray(rng.normal(size=(16, 32)), jnp.float32)
    variables = Half().init(jax.random.key(0), x)
    norm = variables["params"]["BatchNorm_0"] | {"scale": jnp.asarray(rng.uniform(0.5, 2, 32), jnp.float32)}
    variables = {**variables, "params": {**variables["params"], "BatchNorm_0": norm}}
    for fn in (Half().apply, lambda v, x: jax.jit(Half().apply)(v, x).astype(jnp.float32)):
        quantize.fold(fn, variables, x)
        with pytest.raises(ValueError, match=r"off by its rounding: then pass more than tolerance=0\.001"):
            quantize.fold(fn, variables, x, tolerance=1e-3)


@pytest.mark.parametrize("act", [nn.relu, nn.gelu])
def test_half_precision_hides_no_fault(act, rng):
    """Behind a gelu the function is another one; equalize and smooth see it through bfloat16 too."""
    model = nn.Sequential([nn.Dense(32, dtype="bfloat16"), act, nn.Dense(8, dtype="bfloat16")])
    x = jnp.asarray(rng.normal(size=(16, 32)), jnp.float32)
    params = model.init(jax.random.key(0), x)
    loud = params["params"]["layers_0"]["kernel"] * jnp.asarray(rng.uniform(0.1, 10, 32), jnp.float32)
    params = {"params": params["params"] | {"layers_0": params["params"]["layers_0"] | {"kernel": loud}}}
    pairs = [(["layers_0/kernel", "layers_0/bias"], ["layers_2/kernel"])]
    for scale in (
        lambda: quantize.equalize(model.apply, params, x, pairs),
        lambda: quantize.smooth(model.apply, params, [x], pairs),
    ):
        if act is nn.relu:
            scale()
        else:
            with pytest.raises(ValueError, match="changes the function"):
                scale()
