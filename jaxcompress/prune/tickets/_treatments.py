"""What the weights of a ticket begin with: their initial values, or something that shares only part of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.prune.tickets._trees import beside, like, same

MAGNITUDES = ("initial", "constant", "resample", "reshuffle")
SIGNS = ("keep", "own", "random")

TREATMENTS: dict[str, tuple[str, str]] = {
    "rewind": ("initial", "keep"),
    "random_sign": ("initial", "random"),
    "reinitialise": ("resample", "own"),
    "resample_keep_sign": ("resample", "keep"),
    "reshuffle": ("reshuffle", "own"),
    "reshuffle_keep_sign": ("reshuffle", "keep"),
    "reshuffle_random_sign": ("reshuffle", "random"),
    "constant_keep_sign": ("constant", "keep"),
    "constant_random_sign": ("constant", "random"),
}
"""By name, the `(magnitude, sign)` of `treated`: the treatments of Frankle & Carbin 2019 and of Zhou et al. 2019."""


def treated(
    initial: Any,
    masks: Any,
    magnitude: str = "initial",
    sign: str = "keep",
    *,
    key: jax.Array | None = None,
    init: Callable[[jax.Array], Any] | None = None,
) -> Any:
    """The parameters that a ticket's training begins with; zero where a mask prunes.

    Args:
      initial: parameters at initialisation (or at the step that is rewound to).
      masks: tree of bool masks with the parameters' paths, True is kept; parameters without one keep their initial
        values, or with `"resample"` and `"own"` (a network drawn anew) take the new ones.
      magnitude: `"initial"`; `"constant"`: the standard deviation of the layer's initial values, pruned ones included;
        `"resample"`: drawn anew by `init`; `"reshuffle"`: the initial values of the layer's kept weights in random
        order (sorts the layer: over a mesh it is gathered).
      sign: `"keep"`: of the initial value, so that a zero stays zero; `"own"`: as the magnitude brings it, which for
        values that stay or are constant means kept; `"random"`: even odds.
      key: for everything random.
      init: `key -> params`: a fresh initialisation of the same model, for `"resample"`.

    Raises:
      ValueError: no such magnitude or sign; `key` or `init` missing where it is needed; masks or fresh parameters of
        another tree.
    """
    if magnitude not in MAGNITUDES or sign not in SIGNS:
        raise ValueError(f"want a magnitude of {MAGNITUDES} and a sign of {SIGNS}, got {magnitude!r} and {sign!r}")
    if key is None and (magnitude in ("resample", "reshuffle") or sign == "random"):
        raise ValueError(f"magnitude {magnitude!r} with sign {sign!r} is random: pass a key")
    if magnitude == "resample" and init is None:
        raise ValueError("magnitude 'resample' draws values anew: pass init, a function from a key to parameters")
    leaves = jax.tree.leaves(initial)
    kept = beside(initial, masks, "mask")
    own: Any = key  # `None` where nothing is random
    fresh = (
        same(initial, init(jax.random.fold_in(own, 0)), "fresh tree") if init and magnitude == "resample" else leaves
    )
    treated_leaves = []
    for i, (x, mask, new) in enumerate(zip(leaves, kept, fresh, strict=True)):
        if mask is None:
            treated_leaves.append(new if (magnitude, sign) == ("resample", "own") else x)
            continue
        keys: Any = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, i + 1))
        value = _value(magnitude, x, mask, new, keys[0])
        if sign == "keep":
            value = jnp.copysign(value, x) * (x != 0)
        elif sign == "random":
            value = jnp.abs(value) * jax.random.rademacher(keys[1], x.shape, value.dtype)
        treated_leaves.append(jnp.where(mask, value, jnp.zeros_like(x)).astype(x.dtype))
    return like(initial, treated_leaves)


def _value(magnitude: str, x: jax.Array, mask: jax.Array, new: jax.Array, key: Any) -> jax.Array:
    if magnitude == "constant":
        return jnp.sign(x) * jnp.std(x.astype(jnp.float32)).astype(x.dtype)
    if magnitude == "reshuffle":
        return _reshuffled(x, mask, key)
    return new


def _reshuffled(x: jax.Array, mask: jax.Array, key: jax.Array) -> jax.Array:
    """The kept values, each in the place of a random kept one. Shapes are static: so two sorts, and no selection."""
    flat, kept = x.reshape(-1), mask.reshape(-1)
    in_order = jnp.argsort(~kept, stable=True)  # places of kept weights first
    at_random = jnp.argsort(jnp.where(kept, jax.random.uniform(key, kept.shape), 2.0))  # the same, shuffled
    return jnp.zeros_like(flat).at[in_order].set(flat[at_random]).reshape(x.shape)
