"""Faults planted in the rules are seen by the oracle, in every rule: so the oracle can see.

First faults by hand, then each kind of fault in each label function, on programs made of the fuzzer's operations.
"""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels_models import Maker
from channels_mutants import FAULTS, FUNCTIONS, by_chance, directed, met, reached, seen

from jaxcompress.prune import channels
from jaxcompress.prune.channels import _rules_product, _rules_shape
from jaxcompress.prune.channels._labels import Atoms
from jaxcompress.prune.channels._tape import RULES

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5)), jnp.float32)


def through(middle, width=8, out=8, **more):
    """A dense layer, something, a dense layer; with the parameters that something needs."""
    m = Maker()
    params = {"first": m(5, width), "last": m(out, 3), **{k: m(*shape) for k, shape in more.items()}}
    return lambda p, x: middle(p, jnp.tanh(x @ p["first"])) @ p["last"], params


def fault(fn, params):
    """Whether anything shows: an error, or a difference from the masked model."""
    try:
        groups = channels.groups(fn, params, X)
        units = {g.name: np.arange(0, g.size, 3) for g in groups if g.exact}
        if not units:
            return False
        return not channels.verify(fn, params, channels.from_units(groups, units), X, gradient=False).ok
    except Exception:
        return True


def _passing(tracer, call):
    """A rule that lets every axis through, whatever the primitive does to it."""
    x = call.inputs[0]
    return [tracer.value(aval, x.labels[: len(aval.shape)], x.zero[: len(aval.shape)]) for aval in call.avals]


def _all_zero(tracer, call):
    return [dataclasses.replace(v, zero=(True,) * v.ndim) for v in RULE_BEFORE["exp"].label(tracer, call)]


RULE_BEFORE = dict(RULES)

CASES = {
    "rev": (lambda p, h: h[..., ::-1] * p["g"], {"g": (8,)}),
    "cumsum": (lambda p, h: jnp.cumsum(jnp.cos(h), -1), {}),
    "sort": (lambda p, h: jnp.sort(jnp.cos(h), -1), {}),
    "reduce_max": (lambda p, h: h - jnp.cos(h).max(-1, keepdims=True), {}),
    "argmax": (lambda p, h: h + jnp.argmax(jnp.cos(h), -1)[..., None], {}),
    "transpose": (lambda p, h: h.swapaxes(-1, -2).swapaxes(-1, -2) * p["g"], {"g": (8,)}),
    "concatenate": (lambda p, h: jnp.concatenate([h[..., 4:], h[..., :4]], -1) * p["g"], {"g": (8,)}),
    "slice": (lambda p, h: jnp.concatenate([h[..., 3:], h[..., :3]], -1) * p["g"], {"g": (8,)}),
    "split": (lambda p, h: jnp.concatenate(jnp.split(h, 2, -1)[::-1], -1) * p["g"], {"g": (8,)}),
    "reduce_window_max": (
        lambda p, h: jax.lax.reduce_window(jnp.cos(h), -jnp.inf, jax.lax.max, (1, 1, 3), (1, 1, 1), "SAME"),
        {},
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_rule_that_lets_everything_pass_is_seen(name, monkeypatch):
    middle, more = CASES[name]
    fn, params = through(middle, **more)
    assert not fault(fn, params)
    monkeypatch.setitem(RULES, name, dataclasses.replace(RULES[name], label=_passing))
    assert fault(fn, params)


def test_an_exponential_that_would_keep_zeros_is_seen(monkeypatch):
    fn, params = through(lambda p, h: jnp.exp(h) / jnp.exp(h).sum(-1, keepdims=True))
    assert not fault(fn, params)
    monkeypatch.setitem(RULES, "exp", dataclasses.replace(RULES["exp"], label=_all_zero))
    assert fault(fn, params)


def test_labels_that_are_not_made_to_agree_are_seen(monkeypatch):
    fn, params = through(lambda p, h: h + jnp.tanh(h @ p["w"]), w=(8, 8))
    assert not fault(fn, params)
    monkeypatch.setattr(Atoms, "unify", lambda *args: None)
    assert fault(fn, params)


def test_factors_in_the_wrong_order_are_seen(monkeypatch):
    fn, params = through(lambda p, h: h.reshape(2, 4, 2, 4).swapaxes(2, 3).reshape(2, 4, 8) * p["g"], g=(8,))
    assert not fault(fn, params)
    outer = _rules_shape.outer

    def swapped(labels, sizes):
        return outer(labels[::-1], sizes[::-1]) if len(labels) > 1 else outer(labels, sizes)

    monkeypatch.setattr(_rules_shape, "outer", swapped)
    assert fault(fn, params)


def test_a_group_convolution_that_is_taken_for_a_plain_one_is_seen(monkeypatch):
    def middle(p, h):
        return jax.lax.conv_general_dilated(
            h, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        )

    fn, params = through(middle, k=(3, 4, 8))
    assert not fault(fn, params)
    monkeypatch.setattr(
        _rules_product, "_conv_run", lambda runner, step, inputs: [step.primitive.bind(*inputs, **step.params)]
    )
    assert fault(fn, params)


def test_outputs_that_are_not_kept_whole_are_seen(monkeypatch):
    fn, params = through(lambda p, h: jax.nn.softmax(h, -1))
    assert not fault(fn, params)
    monkeypatch.setattr(Atoms, "freeze", lambda *args: None)
    assert fault(fn, params)


UNSEEN = {
    ("_random", "shifted"): "its labels are new ones, in whatever order",
    ("_window", "unsized"): "it runs its primitive otherwise only because that is faster",
}
"""Faults that change something and that no program shows, with the reason for which they do no harm."""

HARMLESS = {
    "_keys": "keys have no axes that can be cut, so nothing is said of them",
    "_axis_index": "a number without axes",
}
"""Label functions in which no kind of fault changes anything."""

ONLY_DIRECTED = {"_other_nary", "_reduce_sum"}
"""Label functions of which random programs show no fault within twelve that meet them."""

pool = cache(reached)


@cache
def meetings():
    return [(seed, met(seed)) for seed in range(160)]


@pytest.mark.parametrize(
    ("function", "fault", "kinds"),
    [
        ("_rev", "shifted", ("reverse", "gain")),
        ("_other_unary", "zeros", ("cosine", "cosine", "channel_sum")),
        ("_conv", "unsized", ("group_conv", "gain")),
        ("_reduce_sum", "unsure", ("cosine", "channel_sum", "gain")),
        ("_sort", "loose", ("cosine", "sorted_channels", "gain")),
    ],
)
def test_a_sample_of_faults_is_seen(function, fault, kinds):
    assert any(seen(function, fault, seed, kinds=kinds) for seed in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("function", list(FUNCTIONS))
def test_every_kind_of_fault_is_seen_in_every_rule(function):
    noticed = {fault: directed(function, fault, pool())[0] for fault in FAULTS}
    touched = {fault for fault, found in noticed.items() if found is not None}
    assert bool(touched) == (function not in HARMLESS)
    assert {fault for fault in touched if not noticed[fault]} == {fault for name, fault in UNSEEN if name == function}
    assert any(noticed.values()) or function in HARMLESS


@pytest.mark.slow
@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name not in HARMLESS])
def test_random_programs_see_a_fault_in_every_rule(function):
    found = by_chance(function, [seed for seed, functions in meetings() if function in functions])
    assert (found is None) == (function in ONLY_DIRECTED)
