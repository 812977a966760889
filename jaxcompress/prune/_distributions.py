"""Distributions: how a sparsity of the whole model is shared out among its layers."""

import math
import re
from typing import Any

from jaxcompress import paths
from jaxcompress.prune._patterns import Unstructured, check_sparsity


def erk(params: Any, rules: paths.Rules[bool], sparsity: float) -> dict[str, Unstructured]:
    """Larger layers are pruned more: Erdos-Renyi-Kernel (Evci et al. 2020, "Rigging the Lottery", section 3).

    A layer of shape `[*kernel, inputs, outputs]` keeps a part of its weights proportional to the sum of its axes'
    lengths over their product. Layers for which that would be more than all of them are kept dense, and the others
    share what is left, so that together `sparsity` of the chosen weights is pruned.

    Args:
      params: the parameters, or their shapes (`jax.eval_shape`).
      rules: by path, whether a parameter takes part; the first match wins, no match is False.
      sparsity: of all weights that take part, in [0, 1).

    Returns:
      Rules for `sparsify`, one a parameter that is pruned: its path as a pattern, and its `Unstructured` sparsity.

    Raises:
      ValueError: a sparsity outside [0, 1), or a rule that matches nothing.
      TypeError: a rule's value is neither a bool nor None.
    """
    check_sparsity(sparsity)
    named = paths.named_leaves(params)
    takes_part = paths.match(rules, [name for name, _ in named], False)
    other = [x for x in takes_part if x is not None and not isinstance(x, bool)]
    if other:
        raise TypeError(
            f"a rule says whether a parameter takes part, True or False, got {other[0]!r}; the sparsity is "
            "one for all, the third argument"
        )
    shapes = {name: x.shape for (name, x), chosen in zip(named, takes_part, strict=True) if chosen}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / max(1, sizes[name]) for name, shape in shapes.items()}
    full: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in full]
        kept = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in full)
        scale = kept / max(1e-30, sum(raw[name] * sizes[name] for name in rest))
        over = {name for name in rest if raw[name] * scale > 1}
        if not over:
            return {f"^{re.escape(name)}$": Unstructured(1 - raw[name] * scale) for name in rest}
        full |= over
