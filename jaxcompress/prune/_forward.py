"""Weights that are sparse in the forward pass only: dense underneath, they go on learning and may come back."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import paths
from jaxcompress.prune._masks import map_masked, masks


def straight_through(tree: Any, state: Any, *, decay: jax.typing.ArrayLike = 0.0) -> Any:
    """`apply_masks`, whose gradient passes to pruned weights too, as if nothing had been pruned.

    The forward pass of straight-through sparse training (Bengio et al. 2013). The masks come from a `sparsify` that
    leaves the updates alone, so that they follow weights that are pruned now and may matter later:

        tx = optax.chain(optax.adam(1e-3), prune.sparsify({"kernel$": prune.NM(2, 4)}, schedule, hold=False))
        loss = lambda params: ...model.apply(prune.straight_through(params, opt_state), x)...
        ...
        params = prune.apply_masks(params, opt_state)  # once, at the end

    Args:
      tree: parameters, found by their paths as in `apply_masks`.
      state: the state of the optimizer that `sparsify` is a part of, or a tree of boolean masks (as `choose` makes it).
      decay: adds `decay * w` to the gradient of a pruned weight `w` (SR-STE, Zhou et al. 2021, equation 9; they take
        2e-4), which keeps masks from flickering. It may change from step to step: a traced number.

    Returns:
      A tree like `tree`, zero where weights are pruned.

    Raises:
      ValueError: as `apply_masks`.
    """
    none = isinstance(decay, int | float) and decay == 0  # then the weights need not be kept for the way back
    return map_masked(lambda x, mask: _passed(x, mask, None if none else decay), tree, masks(state))


@jax.custom_vjp
def _passed(weight: jax.Array, kept: jax.Array, decay: jax.typing.ArrayLike | None) -> jax.Array:
    return jnp.where(kept, weight, jnp.zeros_like(weight))


def _passed_fwd(weight: jax.Array, kept: jax.Array, decay: Any) -> tuple[jax.Array, Any]:
    return _passed(weight, kept, decay), None if decay is None else (weight, kept, decay)


def _passed_bwd(saved: Any, cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    if saved is None:
        return cotangent, None, None
    weight, kept, decay = saved
    return cotangent + jnp.where(kept, jnp.zeros_like(weight), decay * weight).astype(cotangent.dtype), None, None


_passed.defvjp(_passed_fwd, _passed_bwd)


def soft_threshold(weight: jax.Array, threshold: jax.Array) -> jax.Array:
    """`sign(w) * relu(|w| - t)`: zero below the threshold, shrunk by it above; differentiable in both."""
    return jnp.sign(weight) * jax.nn.relu(jnp.abs(weight) - threshold)


def learned_thresholds(params: Any, rules: paths.Rules[float | None]) -> dict[str, jax.Array]:
    """One trainable number a layer, by path, from which `thresholded` makes its threshold: `sigmoid(number)`.

    Args:
      params: the parameters, or their shapes.
      rules: by path, the number to begin with (-5 is a threshold of 0.0067; Kusupati et al. take -3200 to -5 and let
        weight decay on the numbers set the sparsity), or `None` for no threshold.
    """
    names = [name for name, _ in paths.named_leaves(params)]
    starts = dict(zip(names, paths.match(rules, names, None), strict=True))
    return {name: jnp.float32(start) for name, start in starts.items() if start is not None}


def thresholded(params: Any, thresholds: dict[str, jax.Array]) -> Any:
    """`params` with soft thresholds that training learns (STR, Kusupati et al. 2020, "Soft Threshold Weight
    Reparameterization for Learnable Sparsity", equation 5): the forward pass of such a training, and its result.

    Put parameters and thresholds into one tree that the optimizer trains, and call the model with
    `thresholded(params, thresholds)`; weight decay on both pushes towards sparsity.

    Raises:
      ValueError: a threshold finds no parameter.
    """
    named = paths.named_leaves(params)
    missing = sorted(thresholds.keys() - {name for name, _ in named})
    if missing:
        raise ValueError(f"no parameter for the threshold of {missing[0]!r} ({len(missing)} such)")
    leaves = [
        soft_threshold(x, jax.nn.sigmoid(thresholds[name]).astype(x.dtype)) if name in thresholds else x
        for name, x in named
    ]
    return paths.with_leaves(params, leaves)
