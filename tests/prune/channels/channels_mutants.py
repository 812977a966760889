"""Faults that are planted in the rules one at a time, and where each is looked for.

A fault is made by wrapping the label function of all primitives that share it, so none is written for one rule:

* `shifted`: the labels of its results are turned by one index.
* `zeros`: it claims that every slice that is cut is zero.
* `apart`: what it says must agree, needn't.
* `loose`: what it keeps whole, isn't.
* `unsure`: what it notes as a sum over what may not be zero, it doesn't.
* `unsized`: its primitive runs with the sizes that were traced.
"""

import contextlib
import dataclasses

import numpy as np
from channels_fuzz import OPS, difference, program

from jaxcompress.prune import channels
from jaxcompress.prune.channels._labels import Atoms
from jaxcompress.prune.channels._tape import RULES, Tracer

FAULTS = ("shifted", "zeros", "apart", "loose", "unsure", "unsized")
FUNCTIONS = {}  # label function -> its primitives
for _name, _rule in RULES.items():
    FUNCTIONS.setdefault(_rule.label.__name__, []).append(_name)


def _shifted(value):
    labels = tuple(np.roll(label, 1, axis=0) if label is not None else None for label in value.labels)
    return dataclasses.replace(value, labels=labels)


class Planted:
    """What a planted fault did: `touched` is whether it changed anything at all."""

    def __init__(self):
        self.touched = False


@contextlib.contextmanager
def planted(function, fault):
    """The rules with one fault in one label function."""
    rules, unify, freeze, contract = dict(RULES), Atoms.unify, Atoms.freeze, Tracer.contract
    running, found = [], Planted()

    def here(kind):
        return fault == kind and running and running[-1] == function

    def maybe_unify(self, a, b, why):
        if not here("apart"):
            running.append("unify")  # what agrees with a whole axis is kept whole: no fault of its own
            try:
                return unify(self, a, b, why)
            finally:
                running.pop()
        x, y = self.resolve(a), self.resolve(b)
        found.touched |= not (x is y or (x is not None and y is not None and np.array_equal(x, y)))

    def maybe_freeze(self, label, why):
        if not here("loose"):
            return freeze(self, label, why)
        found.touched |= self.resolve(label) is not None

    def maybe_contract(self, label, zero, why):
        if not here("unsure"):
            return contract(self, label, zero, why)
        found.touched |= label is not None and not zero

    def wrapped(rule):
        def label(tracer, call):
            running.append(rule.label.__name__)
            try:
                outs = rule.label(tracer, call)
            finally:
                running.pop()
            if rule.label.__name__ != function:
                return outs
            labelled = [any(label is not None for label in v.labels) for v in outs]
            if fault == "shifted" and not tracer.in_derivative:  # there the two would agree on one unit for all
                found.touched |= any(labelled)
                return [_shifted(v) for v in outs]
            if fault == "zeros":
                found.touched |= any(
                    label is not None and not zero for v in outs for label, zero in zip(v.labels, v.zero, strict=True)
                )
                return [dataclasses.replace(v, zero=(True,) * v.ndim) for v in outs]
            if fault == "unsized" and call.run is not None:
                found.touched = True
                call.run = None
            return outs

        return dataclasses.replace(rule, label=label)

    try:
        RULES.update({name: wrapped(rule) for name, rule in rules.items()})
        Atoms.unify, Atoms.freeze, Tracer.contract = maybe_unify, maybe_freeze, maybe_contract
        yield found
    finally:
        RULES.update(rules)
        Atoms.unify, Atoms.freeze, Tracer.contract = unify, freeze, contract


def met(seed, length=6, kinds=()):
    """The label functions that a program meets."""
    seen, rules = set(), dict(RULES)

    def noted(rule):
        def label(tracer, call):
            seen.add(rule.label.__name__)
            return rule.label(tracer, call)

        return dataclasses.replace(rule, label=label)

    try:
        RULES.update({name: noted(rule) for name, rule in rules.items()})
        fn, params, args = program(seed, length, kinds)
        channels.groups(fn, params, *args)
    finally:
        RULES.update(rules)
    return seen


PAIRED = [lambda kind: (kind, "gain"), lambda kind: ("bias", kind, "residual", "gain")]
SUMMED = [
    lambda kind: ("cosine", kind, "channel_sum"),
    lambda kind: (kind, "channel_sum"),
    lambda kind: ("cosine", kind, "gain"),
    lambda kind: (kind, "gain"),
]
TEMPLATES = {fault: SUMMED if fault in ("zeros", "loose", "unsure") else PAIRED for fault in FAULTS}
"""Other operations around one: before a gain, what is paired wrongly shows; in a sum, what is not zero there."""


def seen(function, fault, seed, length=6, kinds=()):
    """Whether the oracle notices a fault on one program; None if the fault changes nothing there."""
    gradient = function.startswith("_custom") or "pooling_gradient" in kinds
    with planted(function, fault) as found:
        try:
            fn, params, args = program(seed, length, kinds)
            channels.groups(fn, params, *args)
            if not found.touched:
                return None
            off = difference(seed, length, gradient, kinds)
        except Exception:  # sizes that don't fit, or a plan that isn't one: seen as well
            return True if found.touched else None
    return off is not None and off > 1e-3


def directed(function, fault, reach, limit=16):
    """(noticed, what was tried) of a fault on programs about the operations that reach its rule; None if none shows it.

    `reach` is what `reached` gives.
    """
    tried, noticed = [], None
    for seed in range(6):
        for template in TEMPLATES[fault]:
            for kind in reach[function][:3]:
                if len(tried) >= limit:
                    return noticed, tried
                found = seen(function, fault, seed, kinds=template(kind))
                if found is None:
                    continue
                noticed = False
                tried.append(template(kind))
                if found:
                    return True, tried
    return noticed, tried


def reached():
    """label function -> the operations of the pool that meet it, those with the fewest rules first."""
    plain = met(0, kinds=("gain",))
    of = {kind: set().union(*(met(seed, kinds=(kind,)) for seed in range(3))) for kind in OPS}
    found = {function: [] for function in FUNCTIONS}
    for kind in sorted(of, key=lambda kind: (kind.startswith("sharded"), len(of[kind]))):  # those take long to compile
        for function in of[kind]:
            found[function].append(kind)
    for function in plain:  # every program meets these: any operation shows them
        found[function] = ["gain", "bias", *found[function]]
    return found


def by_chance(function, seeds, limit=12):
    """(fault, number of programs) with which random programs that meet a rule first show a fault in it, or None."""
    for tried, seed in enumerate(seeds[:limit], 1):
        for fault in ("shifted", "loose", "unsized", "unsure", "zeros", "apart"):
            if seen(function, fault, seed):
                return fault, tried
    return None
