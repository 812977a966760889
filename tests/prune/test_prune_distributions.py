"""Distributions against the paper's formula and the sparsity that the layers have together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import prune

SHAPES = {"conv1": (3, 3, 3, 16), "conv2": (3, 3, 16, 64), "conv3": (3, 3, 64, 128), "head": (128, 10)}
PARAMS = {name: {"kernel": jax.ShapeDtypeStruct(s, jnp.float32), "bias": jnp.ones(s[-1])} for name, s in SHAPES.items()}


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95, 0.98])
def test_erk_shares_out_the_sparsity(sparsity: float) -> None:
    rules = prune.erk(PARAMS, {"kernel$": True}, sparsity)
    density = {name: 1 - rules[f"^{name}/kernel$"].sparsity if f"^{name}/kernel$" in rules else 1.0 for name in SHAPES}
    sizes = {name: np.prod(shape) for name, shape in SHAPES.items()}
    kept = sum(density[name] * sizes[name] for name in SHAPES)
    assert kept == pytest.approx((1 - sparsity) * sum(sizes.values()))
    scales = [density[n] * sizes[n] / sum(SHAPES[n]) for n in SHAPES if density[n] < 1]
    np.testing.assert_allclose(scales, scales[:1] * len(scales))  # eq. of section 3: density ~ sum / product of lengths
    assert all(density[n] * sizes[n] / sum(SHAPES[n]) <= scales[0] for n in SHAPES if density[n] == 1)
    assert len(scales) >= (1 if sparsity == 0.5 else 2)


def test_erk_refuses_a_sparsity_a_layer() -> None:
    with pytest.raises(TypeError, match=r"takes part, True or False, got 0.9"):
        prune.erk(PARAMS, {"head": None, "kernel$": 0.9}, 0.5)


@pytest.mark.slow
def test_erk_makes_rules_for_sparsify() -> None:
    params = jax.tree.map(lambda x: jnp.ones(x.shape), PARAMS)
    rules = prune.erk(params, [("head", False), ("kernel$", True)], 0.9)
    tx = prune.sparsify(rules, prune.one_shot())
    _, state = tx.update(params, tx.init(params), params)
    masks = prune.masks(state)
    assert set(masks) <= {"conv1/kernel", "conv2/kernel", "conv3/kernel"} and "conv3/kernel" in masks
    total = sum(np.prod(SHAPES[n]) for n in SHAPES if n != "head")
    assert sum(int((~m).sum()) for m in masks.values()) == pytest.approx(0.9 * total, abs=3)


def test_nothing_to_prune() -> None:
    assert all(pattern.sparsity < 1e-6 for pattern in prune.erk(PARAMS, {"kernel$": True}, 0.0).values())


def test_bad_sparsity() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1"):
        prune.erk(PARAMS, {"kernel$": True}, 1.0)
