"""GPTQ against NumPy in float64, and against rounding to the nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import quantize
from jaxcompress.arrays import Quantized, compressed, dense
from jaxcompress.calibrate import InputObserver
from jaxcompress.quantize import Affine

DAMPING = 0.01


def linear(p, x):
    return x @ p["w"]


def problem(rng, rows=200, inputs=24, outputs=16):
    mix = rng.normal(size=(inputs // 2, inputs)) * np.linspace(0.2, 2, inputs)
    x = rng.normal(size=(rows, inputs // 2)) @ mix + 0.1 * rng.normal(size=(rows, inputs))
    return jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32), jnp.asarray(x, jnp.float32)


def oracle(w, x, scale, zero, low, high, order=None):
    """Input by input, with a fresh inverse of what is left of the Hessian at each: the codes."""
    order = np.arange(len(w)) if order is None else order
    w, x = np.array(w, np.float64)[order], np.float64(x)[:, order]
    scale, zero = (np.broadcast_to(np.float64(a), w.shape)[order] for a in (scale, zero))
    h = x.T @ x
    h += DAMPING * np.mean(np.diag(h)) * np.eye(len(h))
    codes = np.zeros(w.shape)
    for j in range(len(w)):
        codes[j] = np.clip(np.round(w[j] / scale[j]) + zero[j], low, high)
        inverse = np.linalg.inv(h[j:, j:])
        w[j:] -= np.outer(inverse[0], (w[j] - scale[j] * (codes[j] - zero[j])) / inverse[0, 0])
    return codes[np.argsort(order)]


@pytest.mark.parametrize(
    ("spec", "by_energy", "block"),
    [(Affine(4), False, 7), (Affine(3, group=(0, 6), symmetric=False), True, 128)],
    ids=["4 bits", "3 bits, groups, asymmetric, by energy"],
)
def test_codes(spec, by_energy, block, rng):
    w, x = problem(rng)
    small = quantize.gptq(
        linear, {"w": w}, [x[:50], x[50:]], {"w": spec}, damping=DAMPING, block_size=block, by_energy=by_energy
    )["w"]
    assert isinstance(small, Quantized) and small.bits == 4
    nearest = quantize.quantize(w, spec)
    np.testing.assert_array_equal(small.scale, nearest.scale)  # the grid is that of rounding to nearest
    zero = 0 if nearest.zero_point is None else nearest.spread(nearest.zero_point)
    order = np.argsort(-np.sum(np.square(x), 0)) if by_energy else None
    expected = oracle(w, x, nearest.spread(nearest.scale), zero, *spec.limits, order)
    # a tie that float32 rounds the other way moves what comes after it, in its own column
    assert np.mean(np.asarray(small.codes()) == expected) > 0.97
    error = jnp.linalg.norm(x @ w - compressed(linear)({"w": small}, x))
    by_oracle = np.linalg.norm(x @ w - x @ (nearest.spread(nearest.scale) * (expected - zero)))
    assert error == pytest.approx(by_oracle, rel=0.02)
    assert error < 0.9 * jnp.linalg.norm(x @ w - x @ nearest.materialise())


@pytest.mark.slow
def test_networks_of_every_kind(rng):
    """Dense, convolution, stacked by scan: each closer to the float model than rounding to nearest, at 4 and 3 bits."""
    params = {
        "conv": jnp.asarray(rng.normal(size=(3, 3, 2, 8)), jnp.float32),
        "stack": jnp.asarray(rng.normal(size=(2, 8, 8)) / 3, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(32, 6, 6, 4)).cumsum(1).cumsum(2) / 3, jnp.float32)  # neighbours are alike

    def fn(p, x):
        x = lax.conv_general_dilated(
            x, p["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )
        x = jax.nn.relu(x).reshape(-1, 8)
        x = lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["stack"])[0]
        return x @ p["out"]

    observer = InputObserver(fn, params, x, {"": True})
    for bits in (4, 3):
        rules = {"stack": Affine(bits, axes=(0, -1)), "": Affine(bits)}
        small, nearest = quantize.gptq(observer, params, [x], rules), quantize.convert(params, rules)
        assert jax.tree.structure(small) == jax.tree.structure(nearest)
        errors = [float(jnp.linalg.norm(fn(params, x) - fn(dense(tree), x))) for tree in (small, nearest)]
        assert errors[0] < 0.9 * errors[1], (bits, errors)


def test_refuses(rng):
    w, x = problem(rng)
    for message, rules, kwargs in [
        ("matches no path", {"kernel": Affine()}, {}),
        ("damping must be positive", {"w": Affine()}, {"damping": -1.0}),
        ("raise the damping", {"w": Affine()}, {"damping": 1e-30}),
        ("cannot quantize 'w': axis 5", {"w": Affine(axes=(5,))}, {}),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize.gptq(linear, {"w": w}, [x[:3]], rules, **kwargs)
    with pytest.raises(ValueError, match=r"cannot quantize 'w': .*non-finite"):
        quantize.gptq(linear, {"w": w.at[0, 0].set(jnp.nan)}, [x], {"w": Affine()})
    with pytest.raises(TypeError, match="a Quantized already"):
        quantize.gptq(linear, {"w": quantize.quantize(w)}, [x], {"w": Affine()})
    with pytest.raises(TypeError, match="an Affine grid, got the rule 4"):
        quantize.gptq(linear, {"w": w}, [x], {"w": 4})
    with pytest.raises(ValueError, match="does not measure Gram"):
        observer = InputObserver(linear, {"w": w}, x, {"w": True}, gram=False)
        quantize.gptq(observer, {"w": w}, [x], {"w": Affine()})


@pytest.mark.parametrize("kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)])
def test_over_eight_devices(kind, rng):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    w, x = problem(rng)
    alone = quantize.gptq(linear, {"w": w}, [x], {"w": Affine(8)})["w"]
    spread = jax.device_put(w, NamedSharding(mesh, P(None, "model")))
    small = quantize.gptq(linear, {"w": spread}, [jax.device_put(x, NamedSharding(mesh, P("data")))], {"w": Affine(8)})
    assert np.mean(np.asarray(small["w"].values) == alone.values) > 0.99  # sums of parts round ties otherwise
    assert small["w"].values.sharding.is_equivalent_to(spread.sharding, 2)
