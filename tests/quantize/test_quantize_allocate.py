"""What schemes cost layers, and the choice under a budget against all choices there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import quantize
from jaxcompress.arrays import nbytes
from jaxcompress.quantize import NF4, Affine, LayerCost

SCHEMES = {"8": Affine(8), "nf4": NF4((0, 8)), "2": Affine(2)}


def fn(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]["kernel"]


def loss(p, x):
    return jnp.mean((fn(p, x) - 1) ** 2)


@pytest.mark.slow
def test_costs_are_what_they_say(rng):
    params = {
        "a": jnp.asarray(rng.normal(size=(16, 12)), jnp.float32),
        "b": {"kernel": jnp.asarray(rng.normal(size=(12, 4)), jnp.float32)},
    }
    x = [jnp.asarray(rng.normal(size=(9, 16)), jnp.float32) for _ in range(2)]
    costs = quantize.layer_costs(fn, params, x, {"a|b": True}, SCHEMES, loss)
    assert [(c.name, c.scheme) for c in costs] == list(itertools.product(["a", "b/kernel"], SCHEMES))
    for cost in costs:
        small = quantize.convert(params, {f"^{cost.name}$": SCHEMES[cost.scheme]})
        w, leaf = (params["a"], small["a"]) if cost.name == "a" else (params["b"]["kernel"], small["b"]["kernel"])
        seen = np.concatenate(x) if cost.name == "a" else np.tanh(np.concatenate(x) @ np.asarray(params["a"]))
        w, rounded = np.asarray(w, np.float64), np.asarray(leaf.materialise(), np.float64)
        assert cost.nbytes == nbytes(leaf)
        snr = 10 * np.log10(np.sum(w**2) / np.sum((w - rounded) ** 2))
        assert cost.weight_snr == pytest.approx(snr, abs=0.01)
        snr = 10 * np.log10(np.sum((seen @ w) ** 2) / np.sum((seen @ (w - rounded)) ** 2))
        assert cost.output_snr == pytest.approx(snr, abs=0.02)
        dense = jax.tree.map(lambda leaf: jnp.asarray(leaf), params) | (
            {"a": jnp.float32(rounded)} if cost.name == "a" else {"b": {"kernel": jnp.float32(rounded)}}
        )
        assert cost.loss == pytest.approx(np.mean([float(loss(dense, batch)) for batch in x]), rel=1e-3)
    chosen = quantize.allocate(costs, budget=16 * 12 + 12 * 4)
    small = quantize.convert(params, quantize.chosen_rules(chosen, SCHEMES))
    assert nbytes(small) <= 16 * 12 + 12 * 4
    without = quantize.layer_costs(fn, params, x, {"a": True}, {"8": Affine(8)})
    assert np.isnan(without[0].loss) and without[0].output_snr == costs[0].output_snr


@pytest.mark.parametrize("by", ["loss", "output", "weight"])
def test_the_choice_is_the_best_of_all(by, rng):
    names, schemes = [f"layer {i}" for i in range(5)], ["8", "4", "2"]
    costs = [
        LayerCost(n, s, int(rng.integers(10, 90)), *(float(x) for x in rng.uniform(0, 30, 2)), float(rng.normal()))
        for n in names
        for s in schemes
    ]
    by_key = {(c.name, c.scheme): c for c in costs}

    def cost(c):
        return {"loss": c.loss, "output": 10 ** (-c.output_snr / 10), "weight": 10 ** (-c.weight_snr / 10)}[by]

    least = sum(min(by_key[n, s].nbytes for s in schemes) for n in names)
    for budget in (least, least + 25, least + 80, 1000):
        options = [
            (sum(cost(by_key[n, s]) for n, s in zip(names, choice, strict=True)), choice)
            for choice in itertools.product(schemes, repeat=5)
            if sum(by_key[n, s].nbytes for n, s in zip(names, choice, strict=True)) <= budget
        ]
        assert quantize.allocate(costs, budget, by) == dict(zip(names, min(options)[1], strict=True))
    with pytest.raises(ValueError, match="more than the budget"):
        quantize.allocate(costs, least - 1)
    with pytest.raises(ValueError, match="by is"):
        quantize.allocate(costs, 1000, "losses")
    with pytest.raises(ValueError, match=r"\['16'\] were chosen"):
        quantize.chosen_rules({"a": "16"}, {"8": Affine(8)})
    with pytest.raises(ValueError, match="no costs"):
        quantize.allocate([], 5)
    with pytest.raises(ValueError, match="not measured"):
        quantize.allocate([costs[0]._replace(loss=float("nan"))], 1000, "loss")


def test_a_loss_that_is_not_a_number_is_the_worst_and_changes_no_criterion():
    nan = float("nan")
    costs = [
        LayerCost(name, scheme, size, 1.0, snr, loss)
        for name, losses in (("a", (1.0, 9.0, nan)), ("b", (3.0, 2.0, 1.0)))
        for scheme, size, snr, loss in zip("842", (8, 4, 2), (40.0, 30.0, 90.0), losses, strict=True)
    ]
    assert quantize.allocate(costs, 100) == quantize.allocate(costs, 100, "loss") == {"a": "8", "b": "2"}
    assert quantize.allocate(costs, 6) == {"a": "4", "b": "2"}
    assert quantize.allocate([c._replace(loss=nan) for c in costs], 100) == {"a": "2", "b": "2"}  # by the outputs
    with pytest.raises(ValueError, match="not finite"):
        quantize.allocate(costs, 5)
