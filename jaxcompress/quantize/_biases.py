"""Bias correction: what rounding adds to a layer's mean output is taken off its bias."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import is_leaf
from jaxcompress.calibrate._batches import check_batches
from jaxcompress.calibrate._watched import Watcher, measured
from jaxcompress.paths import named_leaves
from jaxcompress.quantize._chains import chains


def correct_biases(fn: Callable[[Any, Any], Any], params: Any, small: Any, batches: Iterable[Any]) -> Any:
    """`small` with biases that make up for what rounding moves, on average, at the outputs of each layer.

    Bias correction (Nagel et al. 2019, section 4.2): the mean over the batches of `y - y'` of each compressed weight,
    both from the inputs that the float model has there, is added to what the float model adds behind the weight: its
    bias, or a batch norm's shift. These are found by tracing, as `fold` does, but not inside `scan` and `cond`.

        small = quantize.convert(params, rules)
        small = quantize.correct_biases(model.apply, params, small, batches)

    Args:
      fn: `fn(params, batch)`, the model.
      params: its parameters in float, thin factors (`factorize`) among them or not.
      small: the same tree with compressed weights, as `convert`, `static` or `gptq` made it.
      batches: calibration data, batches of one size.

    Returns:
      `small`; what has no bias of its own stays as it is.

    Raises:
      ValueError: no compressed weight has a bias of its own, or it is compressed too; no batches.
    """
    leaves, tree = dict(named_leaves(params, is_leaf)), jax.tree.structure(small, is_leaf=is_leaf)
    found = dict(named_leaves(small, is_leaf))
    if list(found) != list(leaves):
        raise ValueError("the compressed tree has other leaves than the parameters: they must be of one model")
    check_batches(batches)
    batches = list(batches)
    if not batches:
        raise ValueError("there are no batches to measure inputs on: `batches` is empty")
    behind = {
        name: chain
        for name, chain in chains(fn, params, batches[0]).items()
        if is_leaf(found[name]) and not is_leaf(leaves[name]) and (chain.before or chain.after)
    }
    if not behind:
        raise ValueError("no compressed weight has a bias (or a norm's shift) of its own behind it")
    for chain in behind.values():
        bias = next(iter(chain.after or chain.before))
        if is_leaf(found[bias]):
            raise ValueError(f"{bias!r} is to be corrected, and is compressed itself: leave biases out of the rules")
    seen = measured(Watcher(fn, list(behind), "shift"), params, batches, beside=small)
    for name, chain in behind.items():
        shift = jnp.asarray(np.mean([batch[name] for batch in seen], axis=0))
        bias, sign = next(iter((chain.after or chain.before).items()))
        moved = sign * (chain.slope * shift if chain.after else shift)
        own = found[bias]
        found[bias] = (own + moved.reshape(own.shape)).astype(own.dtype)
    return jax.tree.unflatten(tree, list(found.values()))
