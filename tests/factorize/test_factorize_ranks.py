"""Ranks under a budget, against all choices there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import calibrate, dense, factorize
from jaxcompress.factorize import Svd

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


def outcome(rules, found):
    """Parameters and error of a choice, by the table of options."""
    taken = [own[-1] if spec is None else own[spec.rank - 1] for own, spec in zip(found, rules.values(), strict=True)]
    return sum(cost for cost, _ in taken), sum(error for _, error in taken)


def lower_hull(points):
    hull = []
    for x, y in sorted(points):
        while len(hull) > 1 and (y - hull[-2][1]) * (hull[-1][0] - hull[-2][0]) <= (hull[-1][1] - hull[-2][1]) * (
            x - hull[-2][0]
        ):
            hull.pop()
        if not hull or y < hull[-1][1]:
            hull.append((x, y))
    return hull


@pytest.mark.parametrize("relative", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_against_all_choices(relative):
    """Least at the corners of the hull of all choices, which greedy steps go along; within a step of it elsewhere."""
    found = options(relative)
    every = [(sum(c for c, _ in s), sum(e for _, e in s)) for s in itertools.product(*found)]
    corners = lower_hull(every)
    assert len(corners) > 8
    steps = [a[1] - b[1] for a, b in itertools.pairwise(corners)]
    for i, (budget, least) in enumerate(corners):
        spent, error = outcome(factorize.ranks(PARAMS, CHOSEN, budget, relative=relative), found)
        assert spent == budget and error == pytest.approx(least, abs=1e-5)
        between = budget + 7
        spent, error = outcome(factorize.ranks(PARAMS, CHOSEN, between, relative=relative), found)
        assert spent <= between
        best = min(e for c, e in every if c <= between)
        assert best - 1e-5 <= error <= (best + steps[i] if i < len(steps) else best) + 1e-5


def test_the_choice_is_rules_for_convert():
    rules = factorize.ranks(PARAMS, CHOSEN, 200)
    small, (spent, error) = factorize.convert(PARAMS, rules), outcome(rules, options(True))
    assert sum(x.size for name in "abc" for x in jax.tree.leaves(small[name])) == spent <= 200
    off = [
        np.sum(np.square(np.asarray(PARAMS[name] - dense(small[name])))) / np.sum(np.square(PARAMS[name]))
        for name in "abc"
    ]
    assert sum(off) == pytest.approx(error, rel=1e-4)
    assert factorize.ranks(PARAMS, CHOSEN, 297) == {"^a$": None, "^b$": None, "^c$": None}


@pytest.mark.slow
def test_inputs_multiples_and_stacks():
    params = {"a": PARAMS["b"], "stack": jnp.stack([decaying(16, 16, 0.7) for _ in range(3)])}

    def fn(p, x):
        layers = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x[:, :16], p["stack"])[0]
        return layers.sum() + (x[:, 16:] @ p["a"]).sum()

    x = jnp.asarray(RNG.normal(size=(30, 28)), jnp.float32).at[:, 16:].multiply(jnp.geomspace(1, 1e-3, 12))
    seen = calibrate.input_statistics(fn, params, [x], {"": True})
    rules = {"stack": Svd(stacked=1, round_to=2), "a": Svd()}
    chosen = factorize.ranks(params, rules, 450, seen)
    small = factorize.convert(params, chosen, seen)
    assert small["stack"].rank == 4 and sum(x.size for x in jax.tree.leaves(small)) <= 450
    assert factorize.ranks(params, rules, 450)["^stack$"].rank == 2  # few of the rows of `a` meet much


def test_refused():
    with pytest.raises(ValueError, match="least ranks take 60 parameters, more than the budget of 59"):
        factorize.ranks(PARAMS, CHOSEN, 59)
    with pytest.raises(ValueError, match="rank of 'a' itself"):
        factorize.ranks(PARAMS, {"^a$": Svd(rank=3)}, 100)
    with pytest.raises(TypeError, match="'a': want a rule such as Svd"):
        factorize.ranks(PARAMS, {"^a$": 3}, 100)
    with pytest.raises(ValueError, match="cannot factorize 'bias'"):
        factorize.ranks(PARAMS, {"bias": Svd()}, 100)
