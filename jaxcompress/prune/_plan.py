"""What rules ask of each parameter, and whether a state's masks are of these parameters."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import paths
from jaxcompress.prune._patterns import Below, Pattern, Unstructured
from jaxcompress.prune._schedules import Schedule
from jaxcompress.prune._stored import mask_shape


class Layer(NamedTuple):
    """A parameter that a rule chose, and what is asked of it."""

    name: str
    pattern: Pattern
    start: int  # units pruned at progress 0
    end: int  # units pruned at progress 1; of a `Below` neither counts

    @property
    def scope(self) -> str | None:
        """The name under which layers are ranked together; None for a layer on its own."""
        return self.pattern.scope if isinstance(self.pattern, Unstructured) else None


def plan_for(rules: paths.Rules[Any], params: Any, schedule: Schedule, allow_empty: bool) -> list[Layer | None]:
    """What happens to each leaf of `params`, in tree order; raises ValueError where a rule does not fit."""
    named = paths.named_leaves(params)
    values = paths.match(rules, [name for name, _ in named], None)
    return [_layer(name, x, value, schedule, allow_empty) for (name, x), value in zip(named, values, strict=True)]


def check_weight(name: str, x: Any, may_be: str) -> None:
    """Raises ValueError for what is no array of real floating-point numbers; only such `may_be`."""
    if not hasattr(x, "dtype"):
        raise ValueError(f"{name!r} is a {type(x).__name__}, no array: give it the rule None")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name!r} is {x.dtype}: only floating-point weights can be {may_be}")


def _layer(name: str, x: Any, value: Any, schedule: Schedule, allow_empty: bool) -> Layer | None:
    if value is None:
        return None
    pattern = Unstructured(value) if isinstance(value, int | float) else value
    if not isinstance(pattern, Pattern):
        raise ValueError(f"the rule for {name!r} gives {value!r}: want a pattern, a sparsity in [0, 1), or None")
    check_weight(name, x, "pruned; give it the rule None")
    try:
        pattern.check(x.shape)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    if 0 in x.shape:
        return None  # nothing to prune, and no maximum or mean of scores to rank by
    units, end = pattern.units(x.shape), pattern.budget(x.shape)
    if isinstance(pattern, Below):
        return Layer(name, pattern, 0, 0)
    layer = Layer(name, pattern, round(schedule.initial * units), end)
    if end >= units > 0 and not allow_empty and layer.scope is None:
        raise ValueError(
            f"{name!r} of shape {x.shape} would lose all its weights to {pattern}: lower the sparsity, give it the "
            f"rule None, or pass allow_empty=True"
        )
    if layer.start > end:
        raise ValueError(f"{name!r}: the schedule starts at sparsity {schedule.initial}, above what {pattern} prunes")
    return layer


def flatten(tree: Any) -> tuple[list[jax.Array], Any]:
    leaves, treedef = jax.tree.flatten(tree)
    return leaves, treedef


def masks_of(params: Any, masks: Any, chosen: Sequence[bool]) -> list[Any]:
    """The stored masks leaf by leaf of `params`; raises ValueError if they are not of the parameters `chosen`."""
    named = paths.named_leaves(params)
    try:
        flat = flatten(params)[1].flatten_up_to(masks)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the pruning state is of other parameters: its masks are for {[n for n, _ in paths.named_leaves(masks)]}, "
            f"wanted are {[name for (name, _), c in zip(named, chosen, strict=True) if c]}; init the optimizer anew, "
            f"or restore the state of this model"
        ) from error
    for (name, x), is_chosen, mask in zip(named, chosen, flat, strict=True):
        want = x.shape if is_chosen else None
        have = None if mask is None else mask_shape(mask)
        if want != have:
            raise ValueError(
                f"the pruning state is of other parameters or rules: the mask of {name!r} has shape {have}, "
                f"want {want}; init the optimizer anew, or restore the state of this model"
            )
    return flat
