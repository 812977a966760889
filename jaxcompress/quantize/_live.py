"""Folding under fake quantization: a kernel is rounded as it will be once the norm behind it has gone into it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcompress.arrays import compressed, is_leaf
from jaxcompress.paths import named_leaves
from jaxcompress.quantize._chains import (
    SHAPES,
    Met,
    Operation,
    Value,
    flattened,
    kernel_of,
    moved,
    rebound,
    used,
    used_once,
)


@dataclass(frozen=True)
class Site:
    """A kernel's product and the affine operations behind it, up to the last that scales its channels."""

    name: str
    product: Operation
    met: Met
    path: tuple[Operation, ...]
    factors: tuple[tuple[Value, bool], ...]
    """What scales the channels, and whether it divides."""


def with_folded(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    chosen: Mapping[str, Callable[[Array], Any]],
    view: Callable[[str, Array], Any],
) -> Any:
    """`fn(*args, **kwargs)` with the chosen weights as their views; those with a norm behind them seen as folded.

    Behind a kernel `w` whose channels are scaled by `m`, what is scaled is made by `view(w * m) / m` (Jacob et al.
    2018, section 3.2); `m` itself, and all else that the product is used for, comes from the kernel as it is.

    Args:
      fn: the function; its first argument has the parameters.
      args: its arguments.
      kwargs: its named arguments.
      chosen: by path, what stands for a weight.
      view: as `chosen`, for a weight that was changed.

    Raises:
      ValueError: no chosen kernel has a norm behind it.
    """
    arrays, rest = eqx.partition((args, dict(kwargs)), _is_array)
    results: list[Any] = []

    def flat(arrays: Any, _: Any) -> list[Array]:
        args, kwargs = eqx.combine(arrays, rest)
        outs, tree = jax.tree.flatten(fn(*args, **kwargs))
        results[:] = [tree]
        return [jnp.asarray(x) for x in outs]

    names = [name for name, x in named_leaves(args[0]) if _is_array(x)]
    operations, outputs = flattened(flat, arrays, (), len(names), custom=False)
    inputs = jax.tree.leaves(arrays)
    sites = {site.path[-1]: site for site in _sites(operations, outputs, names, chosen)}
    if not sites:
        raise ValueError(
            "nothing to fold: behind no chosen kernel are its channels scaled (is it used once, as it is, and outside "
            "of scans? does anything but a normalisation use what it gives?)"
        )
    folded = {site.name for site in sites.values()}

    def run(inputs: list[Any]) -> list[Any]:
        known: dict[int, Any] = {}

        def value(x: Value) -> Any:
            return inputs[x.place] if x.place is not None else x.known if x.operation is None else known[id(x)]

        for operation in operations:
            if operation in sites:
                outs: Any = _through(sites[operation], value, view)
            else:
                outs = rebound(operation.eqn, [value(x) for x in operation.inputs])
            for result, out in zip(
                operation.results, outs if operation.eqn.primitive.multiple_results else [outs], strict=True
            ):
                known[id(result)] = out
        return [value(x) for x in outputs]

    viewed = [
        chosen[names[i]](x) if i < len(names) and names[i] in chosen and names[i] not in folded else x
        for i, x in enumerate(inputs)
    ]
    return jax.tree.unflatten(results[0], compressed(run)(viewed))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _through(site: Site, value: Callable[[Value], Any], view: Callable[[str, Array], Any]) -> Any:
    """What the path gives, from the product with the kernel that was rounded as folded."""
    met, kernel = site.met, value(site.met.kernel)
    outputs = [kernel.shape[axis] for axis in met.axes]
    factor = jnp.ones(met.laid(jnp.ones(outputs)).shape, kernel.dtype)
    for core, divides in site.factors:
        own = met.laid(value(core).reshape(outputs))
        factor = factor / own if divides else factor * own
    seen = view(site.name, (kernel * factor).astype(kernel.dtype))
    safe = jnp.where(factor == 0, 1, factor)  # what is not heard may be anything

    def unscaled(weight: Array) -> Array:
        return (weight / safe).astype(kernel.dtype)

    seen = replace(seen, weight=unscaled(seen.weight)) if is_leaf(seen) else unscaled(seen)

    def product(x: Any, w: Any) -> Any:
        for step in met.between:
            w = rebound(step.eqn, [w])
        return rebound(site.product.eqn, [x, w] if met.side else [w, x])

    y = compressed(product)(value(site.product.inputs[1 - met.side]), seen)
    before = site.product.results[0]
    for operation in site.path:
        y = rebound(operation.eqn, [y if operand is before else value(operand) for operand in operation.inputs])
        before = operation.results[0]
    return y


def _sites(
    operations: list[Operation], outputs: list[Value], names: list[str], chosen: Mapping[str, Any]
) -> Iterator[Site]:
    uses, users = used(operations, outputs)
    ends = {id(x) for x in outputs}
    for operation in operations:
        met = kernel_of(operation)
        if met is None or met.kernel.leaf is None or not used_once(met, uses) or names[met.kernel.leaf] not in chosen:
            continue
        size = math.prod(met.kernel.aval.shape[axis] for axis in met.axes)
        path = _scaled(operation.results[0], size, met.own, users, ends)
        if path:
            factors = tuple(
                (_core(next(x for x in step.inputs if x is not before)), step.name == "div")
                for step, before in zip(path, [operation.results[0], *(s.results[0] for s in path)], strict=False)
                if step.name in ("mul", "div")
            )
            yield Site(names[met.kernel.leaf], operation, met, tuple(path), factors)


def _scaled(
    y: Value, size: int, own: tuple[int, ...], users: Mapping[int, list[Operation]], ends: set[int]
) -> list[Operation]:
    """The longest way on from `y` by what adds to its channels or scales them, up to the last that scales them."""
    best: list[Operation] = []
    if id(y) in ends:
        return best
    for operation in users.get(id(y), []):
        if operation.name not in ("convert_element_type", "transpose"):
            others = [x for x in operation.inputs if x is not y]
            if operation.name not in ("add", "sub", "mul", "div") or len(others) != 1:
                continue
            if operation.name in ("sub", "div") and operation.inputs[0] is not y:
                continue
            if _core(others[0]).aval.size != size or not _varies_along(others[0], own):
                continue
        if not all(_statistic(x, size, users, ends) for x in users[id(y)] if x is not operation):
            continue
        rest = _scaled(operation.results[0], size, moved(own, operation), users, ends)
        path = [operation, *rest]
        if (rest or operation.name in ("mul", "div")) and len(path) > len(best):
            best = path
    return best


def _varies_along(x: Value, own: tuple[int, ...]) -> bool:
    """Whether a value is the same along all axes but these."""
    while x.operation is not None and x.operation.name == "convert_element_type":
        x = x.operation.inputs[0]
    axes = [axis for axis, size in enumerate(x.aval.shape) if size > 1]
    if x.operation is not None and x.operation.name == "broadcast_in_dim":
        sizes = x.operation.inputs[0].aval.shape
        placed = x.operation.eqn.params["broadcast_dimensions"]
        axes = [axis for axis, size in zip(placed, sizes, strict=True) if size > 1]
    return set(axes) <= set(own)


def _core(x: Value) -> Value:
    """What a value was broadcast from."""
    while x.operation is not None and x.operation.name in SHAPES:
        x = x.operation.inputs[0]
    return x


def _statistic(operation: Operation, size: int, users: Mapping[int, list[Operation]], ends: set[int]) -> bool:
    """Whether all that an operation gives becomes a number a channel, or less."""
    seen: set[int] = set()
    todo = [operation]
    while todo:
        at = todo.pop()
        if kernel_of(at) is not None:
            return False
        for result in at.results:
            if result.aval.size > size and id(result) not in seen:
                seen.add(id(result))
                if id(result) in ends:
                    return False
                todo += users.get(id(result), [])
    return True
