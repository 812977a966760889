"""Ranks under a budget, against all choices there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import calibrate, dense, factorize
from jaxcompress.factorize import Svd
from jaxcompress.report import parameters

RNG = np.random.default_rng(3)


def decaying(rows, columns, fall):
    """A matrix whose singular values are `fall**i`."""
    left, right = (np.linalg.qr(RNG.normal(size=(n, n)))[0] for n in (rows, columns))
    k = min(rows, columns)
    return jnp.asarray(left[:, :k] * fall ** np.arange(k) @ right[:k], jnp.float32)


PARAMS = {"a": 3 * decaying(10, 12, 0.5), "b": decaying(12, 8, 0.8), "c": decaying(9, 9, 0.95), "bias": jnp.ones(4)}
CHOSEN = {"^[abc]$": Svd()}


def options(relative):
    """Of each weight, what each rank costs and loses; the last one is the weight as it is."""
    found = []
    for name in "abc":
        w = np.asarray(PARAMS[name], np.float64)
        squares = np.linalg.svd(w, compute_uv=False) ** 2
        scale = squares.sum() if relative else 1.0
        thin = [(r * sum(w.shape), squares[r:].sum() / scale) for r in range(1, -(-w.size // sum(w.shape)))]
        found.append([*thin, (w.size, 0.0)])
    return found


def outcome(rules, relative):
    """Parameters and error of a choice, from the weights that it makes."""
    small = factorize.convert(PARAMS, rules) if any(rules.values()) else PARAMS
    error = 0.0
    for name in "abc":
        off = np.sum(np.square(np.asarray(PARAMS[name] - dense(small[name]), np.float64)))
        error += off / np.sum(np.square(np.asarray(PARAMS[name], np.float64))) if relative else off
    return sum(x.size for name in "abc" for x in jax.tree.leaves(small[name])), error


@pytest.mark.parametrize("relative", [True, False])
def test_near_the_least_error_of_all_choices(relative):
    found = options(relative)
    every = sorted((sum(c for c, _ in s), sum(e for _, e in s)) for s in itertools.product(*found))
    largest = max(
        (a[1] - b[1]) for own in found for a, b in itertools.combinations(own, 2)
    )  # what one step could save at most
    exact = 0
    for budget in range(every[0][0], every[-1][0] + 20, 19):
        rules = factorize.ranks(PARAMS, CHOSEN, budget, relative=relative)
        spent, error = outcome(rules, relative)
        least = min(e for c, e in every if c <= budget)
        assert spent <= budget and least - 1e-4 <= error < least + largest
        exact += error <= least + 1e-4
    assert exact >= 10  # of 15
    whole = factorize.ranks(PARAMS, CHOSEN, every[-1][0])
    assert whole == {"^a$": None, "^b$": None, "^c$": None}


def test_where_every_step_fits_nothing_is_better():
    """At the budgets that the greedy choice uses up, up to the first step that does not fit."""
    found = options(True)
    every = [(sum(c for c, _ in s), sum(e for _, e in s)) for s in itertools.product(*found)]
    rules = factorize.ranks(PARAMS, CHOSEN, 100)
    for budget in (10 + 12 + 12 + 8 + 9 + 9 + k * 1 for k in range(0, 200)):
        taken = factorize.ranks(PARAMS, CHOSEN, budget)
        spent, error = 0, 0.0
        for own, spec, (rows, columns) in zip(found, taken.values(), ((10, 12), (12, 8), (9, 9)), strict=True):
            cost, lost = own[-1] if spec is None else own[spec.rank - 1]
            assert spec is None or cost == spec.rank * (rows + columns)
            spent, error = spent + cost, error + lost
        if spent == budget and rules != taken:
            assert error <= min(e for c, e in every if c <= budget) + 1e-6
        rules = taken


def test_inputs_multiples_and_stacks():
    params = {"a": PARAMS["b"], "stack": jnp.stack([decaying(16, 16, 0.7) for _ in range(3)])}

    def fn(p, x):
        return (
            jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x[:, :16], p["stack"])[0].sum()
            + (x[:, 16:] @ p["a"]).sum()
        )

    x = jnp.asarray(RNG.normal(size=(30, 28)), jnp.float32).at[:, 16:].multiply(jnp.geomspace(1, 1e-3, 12))
    seen = calibrate.input_statistics(fn, params, [x], {"": True})
    rules = {"stack": Svd(stacked=1, round_to=3), "a": Svd()}
    chosen = factorize.ranks(params, rules, 500, seen)
    assert chosen["^stack$"] is None or chosen["^stack$"].rank % 3 == 0
    small = factorize.convert(params, chosen, seen)
    assert sum(x.size for x in jax.tree.leaves(small)) <= 500 < parameters(params)
    by_weight = factorize.ranks(params, rules, 500)
    assert by_weight != chosen  # the inputs of `a` meet few of its rows


def test_refused():
    with pytest.raises(ValueError, match="least ranks take 60 parameters, more than the budget of 59"):
        factorize.ranks(PARAMS, CHOSEN, 59)
    with pytest.raises(ValueError, match="rank of 'a' itself"):
        factorize.ranks(PARAMS, {"^a$": Svd(rank=3)}, 100)
    with pytest.raises(ValueError, match="cannot factorize 'bias'"):
        factorize.ranks(PARAMS, {"bias": Svd()}, 100)
