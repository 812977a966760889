"""SparseGPT and Wanda against NumPy in float64, against each other, over devices, and on what they must refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import prune
from jaxcompress.calibrate import InputObserver, Layout
from jaxcompress.prune._post_training import _sparsegpt

DAMPING = 0.01


def linear(p, x):
    return x @ p["w"]


def correlated(rng, rows, inputs):
    """Inputs of which each says much about the others: where making up for errors pays."""
    mix = rng.normal(size=(inputs // 2, inputs)) * np.linspace(0.2, 2, inputs)
    return jnp.asarray(rng.normal(size=(rows, inputs // 2)) @ mix + 0.1 * rng.normal(size=(rows, inputs)), jnp.float32)


def problem(rng, rows=200, inputs=24, outputs=16):
    return jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32), correlated(rng, rows, inputs)


def surgeon(w, x, *, block=None, part=None, nm=None):
    """Optimal brain surgery, input by input, with a fresh inverse of what is left of the Hessian at each."""
    w, x = np.array(w, np.float64), np.float64(x)
    h = 2 * x.T @ x
    h += DAMPING * np.mean(np.diag(h)) * np.eye(len(h))
    n = len(h)
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(n)]
    kept = np.ones(w.shape, bool)
    for j in range(n):
        if block and j % block == 0:
            own = slice(j, min(j + block, n))
            scores = np.stack([w[k] ** 2 / inverses[k][0, 0] for k in range(own.start, own.stop)])
            before = np.floor(part * j * w.shape[1] + 0.5)
            k = int(np.floor(part * own.stop * w.shape[1] + 0.5) - before)
            kept[own] = np.argsort(np.argsort(scores.ravel())).reshape(scores.shape) >= k
        if nm and j % nm[1] == 0:
            scores = np.stack([w[k] ** 2 / inverses[k][0, 0] for k in range(j, j + nm[1])])
            kept[j : j + nm[1]] = np.argsort(np.argsort(scores, axis=0), axis=0) >= nm[1] - nm[0]
        error = np.where(kept[j], 0, w[j]) / inverses[j][0, 0]
        w[j:] -= np.outer(inverses[j][0], error)
    return np.where(kept, w, 0), kept


@pytest.mark.parametrize("block", [1, 10])
def test_sparsegpt_is_optimal_brain_surgery(block, rng):
    w, x = problem(rng)
    expected, kept = surgeon(w, x, block=block, part=0.6)
    pruned = prune.sparsegpt(linear, {"w": w}, [x[:90], x[90:]], {"w": 0.6}, damping=DAMPING, block_size=block)
    np.testing.assert_array_equal(pruned.masks["w"], kept)
    np.testing.assert_allclose(pruned.params["w"], expected, rtol=2e-3, atol=2e-3)
    assert np.sum(pruned.params["w"] == 0) == round(0.6 * w.size)


def test_sparsegpt_n_of_m(rng):
    w, x = problem(rng)
    expected, kept = surgeon(w, x, nm=(2, 4))
    for block in (8, 6):  # 6 is rounded up to whole groups
        pruned = prune.sparsegpt(linear, {"w": w}, [x], {"w": prune.NM(2, 4)}, damping=DAMPING, block_size=block)
        np.testing.assert_array_equal(pruned.masks["w"], kept)
        np.testing.assert_allclose(pruned.params["w"], expected, rtol=2e-3, atol=2e-3)
    assert np.all(np.sum(np.asarray(pruned.params["w"]).reshape(-1, 4, 16) != 0, axis=1) == 2)


@pytest.mark.parametrize("pattern", [prune.Unstructured(0.5), prune.NM(2, 4)], ids=["unstructured", "2:4"])
def test_the_outputs_change_least_in_this_order(pattern, rng):
    w, x = problem(rng)
    rules = {"w": pattern}
    by_size = prune.choose({"w": jnp.abs(w)}, rules)
    candidates = [
        prune.sparsegpt(linear, {"w": w}, [x], rules).params,
        prune.wanda_one_shot(linear, {"w": w}, [x], rules).params,
        prune.apply_masks({"w": w}, by_size),
    ]
    errors = [float(jnp.linalg.norm(x @ w - linear(p, x))) for p in candidates]
    assert errors[0] < 0.9 * errors[1] and errors[1] < errors[2]
    assert all(np.sum(p["w"] == 0) == w.size // 2 for p in candidates)


def test_wanda_ranks_each_outputs_weights(rng):
    w, x = problem(rng)
    pruned = prune.wanda_one_shot(linear, {"w": w, "rest": x}, [x], {"w$": 0.5})
    scores = np.abs(w) * np.linalg.norm(x, axis=0)[:, None]
    expected = np.argsort(np.argsort(scores, axis=0), axis=0) >= 12
    np.testing.assert_array_equal(pruned.masks["w"], expected)
    np.testing.assert_array_equal(pruned.params["w"], np.where(expected, w, 0))
    together = prune.wanda_one_shot(linear, {"w": w}, [x], {"w": 0.5}, per_output=False)
    np.testing.assert_array_equal(together.masks["w"], scores > np.median(scores))
    assert pruned.masks["rest"] is None and pruned.params["rest"] is x
    state = prune.fixed(pruned.masks).init(pruned.params)  # what they are for
    np.testing.assert_array_equal(prune.masks(state)["w"], expected)


@pytest.mark.parametrize(("groups", "pattern"), [(1, prune.NM(2, 4)), (2, 0.5), (8, 0.4)])
def test_convolutions(groups, pattern, rng):
    """A convolution is a product with patches, a grouped one many products; together they lose the weights of one."""
    x = correlated(rng, 3 * 6 * 6, 8).reshape(3, 6, 6, 8)
    w = jnp.asarray(rng.normal(size=(3, 3, 8 // groups, 8)), jnp.float32)

    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    pruned = prune.sparsegpt(fn, {"w": w}, [x], {"w": pattern}, damping=DAMPING).params["w"]
    assert np.sum(pruned == 0) == np.floor((pattern if groups > 1 else 0.5) * w.size + 0.5)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.stack([padded[:, i : i + 6, j : j + 6] for i in range(3) for j in range(3)], axis=-2)
    if groups < 8:  # the groups of 9 x 1 weights have budgets of 3 and 4 in turn
        for inputs, kernel, result in zip(
            *(np.split(a, groups, axis=-1) for a in (patches, np.asarray(w), np.asarray(pruned))), strict=True
        ):
            ask = {"nm": (2, 4)} if groups == 1 else {"block": 128, "part": pattern}
            n = inputs.shape[-1] * 9
            expected, _ = surgeon(kernel.reshape(n, -1), inputs.reshape(-1, n), **ask)
            np.testing.assert_allclose(result.reshape(n, -1), expected, rtol=5e-3, atol=5e-3)


def test_stacked_layers_are_pruned_as_if_alone(rng):
    ws, x = jnp.asarray(rng.normal(size=(3, 8, 8)), jnp.float32), correlated(rng, 50, 8)

    def scanned(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    pruned = prune.sparsegpt(scanned, {"w": ws}, [x], {"w": prune.Unstructured(0.6, stack=1)})
    for layer in range(3):
        alone = prune.sparsegpt(linear, {"w": ws[layer]}, [x], {"w": 0.6})
        np.testing.assert_array_equal(pruned.masks["w"][layer], alone.masks["w"])
        np.testing.assert_allclose(pruned.params["w"][layer], alone.params["w"], rtol=1e-3, atol=1e-4)
        x = jnp.tanh(x @ ws[layer])


def two_layers(p, x):
    return jax.nn.relu(x @ p["z"]) @ p["a"]


def test_one_layer_after_the_other(rng):
    """Later inputs are measured behind pruned layers, in the order of use, not of names."""
    z, x = problem(rng, inputs=16)
    params = {"z": z, "a": jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)}
    rules = {"z|a": 0.7}
    first = prune.sparsegpt(two_layers, params, [x], {"z": 0.7})
    second = prune.sparsegpt(two_layers, first.params, [x], {"a": 0.7})
    observer = InputObserver(two_layers, params, x, rules)
    at_once = prune.sparsegpt(observer, params, [x], rules)
    for order in (True, ["z", "a"]):
        pruned = prune.sparsegpt(observer, params, [x], rules, sequential=order)
        for name, expected in {"z": first, "a": second}.items():
            np.testing.assert_array_equal(pruned.params[name], expected.params[name])
    assert not np.array_equal(pruned.params["a"], at_once.params["a"])
    np.testing.assert_array_equal(pruned.params["z"], at_once.params["z"])


@pytest.mark.parametrize("kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)])
def test_over_eight_devices(kind, rng):
    """Weights divided along their outputs, batches along their examples: the same, and no weight is gathered."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    w, x = problem(rng, inputs=24, outputs=32)
    placed = {"w": jax.device_put(w, NamedSharding(mesh, P(None, "model")))}
    batch = jax.device_put(x, NamedSharding(mesh, P("data")))
    ways = (functools.partial(prune.sparsegpt, block_size=8), 0.6), (prune.wanda_one_shot, prune.NM(2, 4))
    for way, rule in ways if kind == AxisType.Explicit else (ways[0], (ways[0][0], prune.NM(2, 4))):
        alone = way(linear, {"w": w}, [x], {"w": rule})
        spread = way(linear, placed, [batch], {"w": rule})
        np.testing.assert_array_equal(alone.masks["w"], spread.masks["w"])
        np.testing.assert_allclose(alone.params["w"], spread.params["w"], rtol=1e-3, atol=1e-4)
        assert spread.params["w"].sharding.is_equivalent_to(placed["w"].sharding, 2)


def test_collectives_are_scalars(rng):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    w = jax.device_put(jnp.ones((24, 32)), NamedSharding(mesh, P(None, "model")))
    gram = jax.device_put(jnp.eye(24)[None], NamedSharding(mesh, P()))
    layout, budgets = Layout((24, 32), (), 0, (), (0,), (1,)), jnp.full((1, 3), 128, jnp.uint32)
    lowered = _sparsegpt.lower(w, gram, 0.01, budgets, layout=layout, nm=None, group=8, block=8)
    text = lowered.compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    sizes = [line.split("=")[1].split("all-reduce")[0] for line in text.splitlines() if " all-reduce(" in line]
    assert sizes and all("[]" in size or "[1]" in size for size in sizes)


def test_inputs_that_never_speak(rng):
    """Inputs that are zero in every batch go first, and nothing divides by them."""
    w, x = problem(rng)
    x = x.at[:, :5].set(0)
    pruned = prune.sparsegpt(linear, {"w": w}, [x], {"w": 0.5})
    assert np.all(np.isfinite(pruned.params["w"])) and np.all(pruned.params["w"][:5] == 0)
    np.testing.assert_array_equal(np.sum(~pruned.masks["w"][:5]), 5 * 16)
    silent = prune.sparsegpt(linear, {"w": w}, [jnp.zeros((4, 24))], {"w": 0.5})
    assert np.all(silent.params["w"] == 0)
    one_row = prune.sparsegpt(linear, {"w": w.astype(jnp.bfloat16)}, [x[:1]], {"w": 0.5})
    assert np.all(np.isfinite(one_row.params["w"])) and one_row.params["w"].dtype == jnp.bfloat16


def test_refuses(rng):
    w, x = problem(rng)
    params = {"w": w}
    for message, rules, kwargs in [
        ("matches no path", {"kernel": 0.5}, {}),
        ("want a sparsity, Unstructured without", {"w": prune.vectors(0.5)}, {}),
        ("want a sparsity, Unstructured without", {"w": prune.Unstructured(0.5, scope="all")}, {}),
        (r"input axes \[0\].*not along axis 1", {"w": prune.NM(2, 4, axis=1)}, {}),
        ("5 does not divide", {"w": prune.NM(2, 5)}, {}),
        ("5 must divide", {"w": prune.NM(2, 5, pad=True)}, {}),
        ("no scan slices off", {"w": prune.Unstructured(0.5, stack=1)}, {}),
        ("lose all its weights", {"w": 0.9999}, {}),
        ("damping must be positive", {"w": 0.5}, {"damping": 0.0}),
        ("the order of", {"w": 0.5}, {"sequential": ["v"]}),
        ("raise the damping", {"w": 0.5}, {"damping": 1e-30}),
    ]:
        with pytest.raises(ValueError, match=message):
            prune.sparsegpt(linear, params, [x[:3]], rules, **kwargs)
    with pytest.raises(ValueError, match="'w' are not finite"):
        prune.sparsegpt(linear, {"w": w.at[0, 0].set(jnp.inf)}, [x], {"w": 0.5})
    with pytest.raises(ValueError, match="inputs of 'w' are not finite"):
        prune.wanda_one_shot(linear, params, [x.at[0, 0].set(jnp.nan)], {"w": 0.5})
    with pytest.raises(ValueError, match="not an iterator"):
        prune.wanda_one_shot(linear, params, iter([x]), {"w": 0.5}, sequential=True)
    for message, observer in [
        (r"does not measure \['v'\]", InputObserver(linear, params | {"v": w}, x, {"w": True})),
        ("squares only", InputObserver(linear, params, x, {"w": True}, gram=False)),
    ]:
        with pytest.raises(ValueError, match=message):
            prune.sparsegpt(observer, {"w": w, "v": w}, [x], {"w" if "squares" in message else "w|v": 0.5})
    with pytest.raises(ValueError, match="batches` is empty"):
        prune.wanda_one_shot(linear, params, [], {"w": 0.5})
