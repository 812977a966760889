"""Random programs: a few operations in a row on values [batch, time, channels], from all kinds that have a rule."""

import channels_ops_more  # noqa: F401 its operations register themselves
import jax
import jax.numpy as jnp
import numpy as np
from channels_ops import OPS, Maker

from jaxcompress.prune import channels


def program(seed, length=6, kinds=()):
    """(fn, params, inputs) of a random program, or of one of the given kinds of operations, with others before those
    that do not fit; the last value goes through a dense layer to the output."""
    rng = np.random.default_rng(seed)
    m, sizes, steps = Maker(rng), [8], []
    first, last = m(5, 8), None
    used, wanted = [], list(kinds)
    while wanted or (not kinds and len(used) < length):
        name = wanted[0] if wanted else str(rng.choice(list(OPS)))
        if name.startswith("sharded") and not wanted and rng.random() < 0.7:  # they take long to compile
            continue
        built = OPS[name](m, sizes[-1], sizes)
        fits = built is not None and 2 <= built[0] <= 24
        if not fits and wanted:
            name = "dense"
            built = OPS[name](m, sizes[-1], sizes)
        elif wanted:
            wanted.pop(0)
        if fits or wanted:
            sizes.append(built[0])
            steps.append(built[1])
            used.append(name)
    last = m(sizes[-1], 3)

    def fn(p, x):
        values = [jnp.tanh(x @ p[first])]
        for step in steps:
            values.append(step(p, values[-1], values))
        return values[-1] @ p[last]

    x = jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32)
    fn.__name__ = "+".join(used)
    return fn, m.params, (x,)


def difference(seed, length=6, gradient=True, kinds=(), double=False):
    """How far the cut program is from the masked one, in single or double precision; infinitely, where the masked one
    overflows; None if it has no exact group to cut."""
    with jax.enable_x64(double):
        return _difference(seed, length, gradient, kinds)


def _difference(seed, length, gradient, kinds):
    fn, params, args = program(seed, length, kinds)
    params, args = jax.tree.map(lambda a: a.astype(float) if a.dtype == jnp.float32 else a, (params, args))
    groups = channels.groups(fn, params, *args)
    rng = np.random.default_rng(seed)
    units = {
        g.name: rng.choice(g.size, int(rng.integers(1, g.size)), replace=False)
        for g in groups
        if g.exact and (kinds or rng.random() < 0.8)
    }
    if not units:
        return None
    plan = channels.from_units(groups, units)
    found = channels.verify(fn, params, plan, *args, gradient=gradient)
    return max(found.forward, found.gradient or 0.0) if found.finite else np.inf
