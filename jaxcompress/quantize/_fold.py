"""Folding: a normalisation's scale goes into the kernel in front of it, so that what is rounded is what is used."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcompress.arrays import compressed, is_leaf
from jaxcompress.paths import named_leaves, with_leaves
from jaxcompress.quantize._chains import Chain, along, chains
from jaxcompress.quantize._scaling import check_same


def fold(fn: Callable[[Any, Any], Any], params: Any, batch: Any, *, tolerance: float | None = None) -> Any:
    """Parameters of the same function, in which normalisations no longer scale what the kernels in front give.

    Batch-norm folding (Jacob et al. 2018, section 3.2), for any function: behind each kernel that is used once, in a
    product or a convolution, the trace is followed as far as it is affine with parameters alone. The factor found there
    goes into the kernel and into what is added before it; the parameter that made it becomes what makes a factor of 1.
    Then a second scale behind the first one's shift (a layer's scale) is folded too.
    The tree keeps its structure: a batch norm stays, and only shifts. Layers in `scan` and `cond` stay as they are.

        variables = quantize.fold(lambda v, x: model.apply(v, x, train=False), variables, x)
        small = quantize.convert(variables, rules)

    To train on under `fake`, with the rounding of folded kernels, keep the statistics frozen (`train=False`).

    Args:
      fn: `fn(params, batch)`, the model as it is used after training, with running averages.
      params: all that the function takes: for Linen `variables`, with `batch_stats`. Compressed kernels stay as they
        are.
      batch: one, to trace the function and to see that it stays the same.
      tolerance: how far, relative to its norm, the function's output may be off after folding: by
        default 1e-3, and where it computes in half precision four of its steps if that is more (0.03 of bfloat16).

    Raises:
      ValueError: nothing to fold; or the function is another one after it.
    """
    leaves, folded, out = dict(named_leaves(params, is_leaf)), set[str](), params
    for _ in range(10):  # again, for a second scale behind the first one's shift
        more: dict[str, Array] = {}
        for kernel, chain in chains(fn, out, batch).items():
            found = _unscaled(chain, leaves)
            if found is not None and (kernel not in folded or not bool(jnp.allclose(found[1], 1, rtol=1e-4))):
                own, factor = leaves[kernel], along(found[1], chain.axes, leaves[kernel].ndim)
                more |= found[0] | {kernel: (own * factor).astype(own.dtype)}
                folded.add(kernel)
        if not more:
            break
        leaves |= more
        out = with_leaves(params, list(leaves.values()), is_leaf)
    if not folded:
        raise ValueError(
            "nothing to fold: no kernel's product is scaled, channel by channel, by parameters alone (is the function "
            "the one that uses running averages? are its layers in a scan?)"
        )
    run = compressed(fn) if any(map(is_leaf, leaves.values())) else fn
    check_same(run, params, out, batch, tolerance, usual=1e-3)
    return out


def _unscaled(chain: Chain, leaves: dict[str, Array]) -> tuple[dict[str, Array], Array] | None:
    """The chain's parameters for which its slope is 1, and the factor; `None` if there are none, or nothing scales."""
    ones = jnp.ones(chain.slope.shape)
    probe = jnp.asarray(np.random.default_rng(0).normal(size=chain.slope.shape), jnp.float32)
    before = chain.run(probe, {})
    size = jnp.maximum(jnp.max(jnp.abs(before)), 1e-30)
    for scale in _with_slope_one(chain, leaves):
        factor = chain.slope / (chain.run(ones, scale) - chain.run(0 * ones, scale))  # 1 is not to be had in bfloat16
        changed = scale | {
            name: (leaves[name] * factor.reshape(leaves[name].shape)).astype(leaves[name].dtype)
            for name in chain.before
        }
        after = chain.run(factor * probe, changed)
        rounding = max(float(jnp.finfo(x.dtype).eps) for x in changed.values())
        if bool(jnp.all(jnp.abs(after - before) <= max(1e-4, 2 * rounding) * size)):
            return changed, factor
    return None


def _with_slope_one(chain: Chain, leaves: dict[str, Array]) -> Iterator[dict[str, Array]]:
    """Each parameter that sets the slope, so that it is 1."""

    def slope(name: str, x: Array) -> Array:
        at_one = chain.run(jnp.ones(chain.slope.shape), {name: x})
        return (at_one - chain.run(jnp.zeros(chain.slope.shape), {name: x})).reshape(x.shape)

    for name in chain.scales:  # one that multiplies: a norm's scale
        x, own = leaves[name], chain.slope.reshape(leaves[name].shape)
        a_unit = slope(name, jnp.ones_like(x))
        if bool(jnp.allclose(slope(name, 2 * x), 2 * own, rtol=1e-4, atol=1e-7)) and bool(jnp.all(a_unit != 0)):
            yield {name: (1 / a_unit).astype(x.dtype)}
    for name in chain.scales:  # a variance, with rsqrt(x + epsilon) and no scale
        x = leaves[name]
        epsilon = 1 / slope(name, jnp.zeros_like(x)) ** 2
        wanted = (1 - epsilon).astype(x.dtype)
        if bool(jnp.allclose(slope(name, wanted), 1, rtol=1e-4)):
            yield {name: wanted}
