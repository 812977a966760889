"""What stands in front of which weights: found in the trace, and tried."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcompress.arrays import is_leaf
from jaxcompress.calibrate import InputObserver, Layout
from jaxcompress.paths import named_leaves, with_leaves
from jaxcompress.quantize._chains import SHAPES, Operation, Value, flattened, kernel_of, of_params, used
from jaxcompress.quantize._scaling import move_scale, shared_channels, with_fronts

_SCALED = {"mul", "div", "transpose", *SHAPES}


def pairs(
    fn: Callable[[Any, Any], Any], params: Any, batch: Any, *, tolerance: float = 1e-3
) -> list[tuple[list[str], list[str]]]:
    """The pairs that `equalize`, `smooth` and `awq` take: what stands in front of which weights, by path.

        found = quantize.pairs(model.apply, params, x)
        # [(["norm/scale", "norm/bias"], ["query/kernel", "key/kernel", "value/kernel"]), (["value/kernel", ...
        scaled = quantize.awq(model.apply, params, batches, rules, found)

    In front may stand a kernel with what is added behind it, or the scale and shift of a normalisation. From there the
    trace is followed to the weights of the next products. Whether a positive scale really passes everything on the way
    (rectifiers, pooling, attention's weighted sums and gates do; gelu, softmax and sums with other branches do not) is
    no matter of names: it is tried, with random weights and scales, and a pair under which the function changes is left
    out. So is a weight that is used more than once, and all inside `scan` and `cond`.

    A norm that multiplies by `1 + g` (Gemma's) cannot be scaled by scaling `g`, and is left out. Hand in the function
    of the gains themselves, `lambda p, x: fn(plus(p, -1), x)` on `plus(params, 1)`, where `plus` adds a number to each
    `g`; and take the 1 off again afterwards.

    Args:
      fn: `fn(params, batch)`, the model as it is used after training.
      params: a tree of float arrays.
      batch: one; small is enough.
      tolerance: how far, relative to its norm, an output may be off for a pair to count; rounding errors of bfloat16
        need about 0.02.

    Returns:
      Pairs, in the order of the trace; no weight is behind two of them. The list may be empty.
    """
    leaves = {name: jnp.asarray(x) for name, x in named_leaves(params, is_leaf)}
    names = list(leaves)
    operations, outputs = flattened(fn, params, batch, len(names))
    uses, users = used(operations, outputs)
    ends, candidates = {id(x) for x in outputs}, []
    for operation in operations:
        start = _scaling_leaf(operation)
        if start is None or uses[id(start)] != 1:
            continue
        value, added = _with_shifts(operation.results[0], uses, users)
        met, parts = _weights_behind(value, users, ends), [start, *added]
        if met and all(x.leaf is not None and uses[id(x)] == 1 for x in (*parts, *met)):
            candidates.append(([names[x.leaf or 0] for x in parts], [names[x.leaf or 0] for x in met]))
    weights = list(dict.fromkeys(name for _, behind in candidates for name in behind))
    if not weights:
        return []
    measured = {f"^{re.escape(name)}$": True for name in weights}
    observer = InputObserver(fn, params, batch, measured, gram=False)
    layouts = with_fronts(fn, params, batch, candidates, observer.layouts)
    run = jax.jit(lambda changed: fn(with_leaves(params, list({**leaves, **changed}.values()), is_leaf), batch))
    found: list[tuple[list[str], list[str]]] = []
    taken: set[str] = set()
    for front, behind in candidates:
        if taken.isdisjoint(behind) and _passes(run, leaves, front, behind, layouts, tolerance):
            found.append((front, behind))
            taken.update(behind)
    return found


def _scaling_leaf(operation: Operation) -> Value | None:
    """The kernel of a product, or a parameter that multiplies, channel by channel."""
    met = kernel_of(operation)
    if met is not None:
        return _single(met.kernel)
    if operation.name != "mul" or operation.inputs[0].settled == operation.inputs[1].settled:
        return None
    scale, shape = _single(next(x for x in operation.inputs if x.settled)), operation.results[0].aval.shape
    return scale if scale is not None and shape and 1 < scale.aval.size == shape[-1] else None


def _single(x: Value) -> Value | None:
    """The one parameter that a value is made of."""
    parts = of_params([x]) if x.settled else []
    return parts[0] if len(parts) == 1 else None


def _with_shifts(y: Value, uses: Counter[int], users: Mapping[int, list[Operation]]) -> tuple[Value, list[Value]]:
    """Where `y` is, with all that is added to it; and the parameters that are added."""
    added: list[Value] = []
    while uses[id(y)] == 1 and id(y) in users:
        operation = users[id(y)][0]
        others = [x for x in operation.inputs if x is not y]
        if operation.name in ("add", "sub") and len(others) == 1 and others[0].settled:
            added += of_params(others)
        elif operation.name not in _SCALED or (operation.name == "div" and operation.inputs[0] is not y):
            break
        y = operation.results[0]
    return y, added


def _weights_behind(y: Value, users: Mapping[int, list[Operation]], ends: set[int]) -> list[Value]:
    """The weights of the first products that `y` reaches; none if it reaches a result, or a product of another kind."""
    found: dict[int, Value] = {}
    seen, todo = {id(y)}, [y]
    while todo:
        value = todo.pop(0)
        if id(value) in ends:
            return []
        for operation in users.get(id(value), []):
            met = kernel_of(operation)
            if met is not None and met.kernel.settled:
                weight = _single(met.kernel)
                if weight is None:
                    return []
                found[id(weight)] = weight
                continue
            for result in operation.results:
                if id(result) not in seen:
                    seen.add(id(result))
                    todo.append(result)
    return list(found.values())


def _passes(
    run: Callable[[Any], Any],
    leaves: Mapping[str, Array],
    front: Sequence[str],
    behind: Sequence[str],
    layouts: Mapping[str, Layout],
    tolerance: float,
) -> bool:
    """Whether a random scale, moved from front to behind, leaves the function as it is; and matters to it at all."""
    rng = np.random.default_rng(0)
    drawn = {name: _like(leaves[name], rng) for name in dict.fromkeys((*front, *behind))}
    try:
        channels = shared_channels(front, behind, leaves, layouts)
    except ValueError:
        return False
    scale = jnp.asarray(np.exp(rng.uniform(-1, 1, channels)), jnp.float32)
    moved = dict(drawn)
    move_scale(moved, front, {name: layouts[name] for name in behind}, scale)
    in_front = {name: moved[name] for name in front}
    with jax.default_matmul_precision("highest"):
        trees = ({**leaves, **changed} for changed in (drawn, moved, {**drawn, **in_front}))  # all: compiled once
        wanted, got, other = map(run, trees)
    return _off(wanted, got) <= tolerance < _off(wanted, other) / 10


def _like(x: Array, rng: np.random.Generator) -> Array:
    size = float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))
    return jnp.asarray(rng.normal(size=x.shape) * (size or 0.5), x.dtype)


def _off(wanted: Any, got: Any) -> float:
    """The largest relative difference of any output; not a number counts as infinite."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            off = float(jnp.linalg.norm((a - b).ravel()) / jnp.maximum(jnp.linalg.norm(a.ravel()), 1e-30))
            worst = max(worst, off if np.isfinite(off) else np.inf)
    return worst
