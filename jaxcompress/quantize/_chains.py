"""What stands behind a kernel before anything that is not affine: its bias, a normalisation, found in the jaxpr."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array, Float

from jaxcompress.arrays import dense, is_leaf
from jaxcompress.paths import named_leaves

_INLINE = {"jit", "pjit", "closed_call", "core_call"}
_CUSTOM = {"custom_jvp_call", "remat2", "checkpoint"}
_AFFINE = {"add", "sub", "mul", "div"}
SHAPES = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "convert_element_type"}
"""What gives the same numbers in another shape or dtype."""


@dataclass(frozen=True, eq=False)
class Value:
    """A value of the flattened function: an input leaf, a constant, or what an operation gives."""

    aval: Any
    operation: "Operation | None" = None
    known: Any = None
    leaf: int | None = None
    settled: bool = False
    """Whether it depends on parameters alone."""
    place: int | None = None
    """Of an argument, among all."""


@dataclass(frozen=True, eq=False)
class Operation:
    """A primitive and its operands; its results name it."""

    eqn: Any
    inputs: tuple[Value, ...]
    results: list[Value] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the primitive."""
        return str(self.eqn.primitive.name)


@dataclass(frozen=True)
class Met:
    """A kernel and the product that it meets an input in."""

    kernel: Value
    axes: tuple[int, ...]
    """Of the kernel, that stay."""
    own: tuple[int, ...]
    """The same axes of the result, in their order there."""
    between: tuple[Operation, ...]
    """What casts, transposes or flips the kernel on its way."""
    side: int
    """Of the operands, which comes of the kernel."""

    def laid(self, channels: Array) -> Array:
        """A number a channel, `[*outputs]`, along the kernel's axes."""
        return along(channels, self.axes, self.kernel.aval.ndim)


def along(channels: Float[Array, "*outputs"], axes: Sequence[int], ndim: int) -> Array:
    """A number a channel laid along these axes of an array with `ndim` axes, 1 along all others."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    turned = jnp.transpose(channels, order)
    return jnp.expand_dims(turned, [axis for axis in range(ndim) if axis not in axes])


@dataclass(frozen=True)
class Chain:
    """The affine function, channel by channel, that follows a kernel's product: `y -> slope * y + ...`.

    Attributes:
      axes: the kernel's axes that are the product's output channels, in the order of the product's.
      slope: `[*outputs]`, of the kernel's output channels.
      scales: parameters that the slope depends on.
      before: what is added before the slope is multiplied in, with its sign.
      after: what is added after, with its sign.
      run: `run(y, changed) -> result`, the chain with some of its parameters (by name) changed, on `y [*outputs]`.
    """

    axes: tuple[int, ...]
    slope: Float[Array, "*outputs"]
    scales: tuple[str, ...]
    before: dict[str, float]
    after: dict[str, float]
    run: Callable[[Array, dict[str, Array]], Array]


def chains(fn: Callable[[Any, Any], Any], params: Any, batch: Any) -> dict[str, Chain]:
    """For each kernel (by path) that is used once, in a product or convolution: what follows it.

    On its way there it may be cast and transposed, to either side of the product. Only what is affine in the product,
    channel by channel, with parameters that are used nowhere else, counts; the chain ends before anything else. Kernels
    inside `scan` and `cond` are not found, nor are compressed ones.
    """
    named = named_leaves(params, is_leaf)
    names, leaves = [name for name, _ in named], [dense(x) for _, x in named]
    # dense, for a compressed leaf is several arguments of the trace, and those behind it would have others' names
    operations, outputs = flattened(fn, dense(params), batch, len(leaves))
    uses, users = used(operations, outputs)
    found: dict[str, Chain] = {}
    for operation in operations:
        met = kernel_of(operation)
        if met is None or met.kernel.leaf is None or is_leaf(named[met.kernel.leaf][1]) or not used_once(met, uses):
            continue
        parts, path = _shortened(_follow(operation.results[0], uses, users), uses)
        chain = _chain(path, operation.results[0], met, parts, names, leaves)
        while chain is None and path:  # up to what is not channel by channel, or sums another way
            path = path[:-1]
            parts = _parameters(path)
            chain = _chain(path, operation.results[0], met, parts, names, leaves)
        if chain is not None:
            found[names[met.kernel.leaf]] = chain
    return found


def used(operations: Sequence[Operation], outputs: Sequence[Value]) -> tuple[Counter[int], dict[int, list[Operation]]]:
    """By each value's id: how often it is used, and by which operations."""
    uses = Counter(id(x) for operation in operations for x in operation.inputs) + Counter(id(x) for x in outputs)
    users: dict[int, list[Operation]] = {}
    for operation in operations:
        for x in operation.inputs:
            users.setdefault(id(x), []).append(operation)
    return uses, users


def flattened(
    fn: Callable[[Any, Any], Any], params: Any, batch: Any, n: int, *, custom: bool = True
) -> tuple[list[Operation], list[Value]]:
    """The function's operations and its results; its first `n` arguments are parameters.

    Inner jits are inlined; with `custom` also what only derivatives see: functions that have one of their own (a
    rectifier), and `remat`.
    """
    inline = _INLINE | _CUSTOM if custom else _INLINE
    closed = jax.make_jaxpr(fn)(params, batch)
    operations: list[Operation] = []

    def walk(jaxpr: Any, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
        env = {v: Value(v.aval, known=c, settled=True) for v, c in zip(jaxpr.constvars, consts, strict=True)}
        env |= dict(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> Value:
            return Value(v.aval, known=v.val, settled=True) if isinstance(v, Literal) else env[v]

        for eqn in jaxpr.eqns:
            inputs = tuple(read(v) for v in eqn.invars)
            if eqn.primitive.name in inline:
                inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                results = walk(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
            else:
                operation = Operation(eqn, inputs)
                settled = all(x.settled for x in inputs)
                results = [Value(v.aval, operation=operation, settled=settled) for v in eqn.outvars]
                operation.results.extend(results)
                operations.append(operation)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    args = [Value(v.aval, leaf=i if i < n else None, settled=i < n, place=i) for i, v in enumerate(closed.jaxpr.invars)]
    outputs = walk(closed.jaxpr, closed.consts, args)
    return operations, outputs


def kernel_of(operation: Operation) -> Met | None:
    """The kernel of a product, traced back to before it was cast, transposed or flipped."""
    if len(operation.inputs) != 2:
        return None
    left, right = operation.inputs
    if operation.name == "conv_general_dilated" and not left.settled:
        numbers = operation.eqn.params["dimension_numbers"]
        return _met(operation, 1, (numbers.rhs_spec[0],), (numbers.out_spec[1],))
    if operation.name == "dot_general" and not (left.settled and right.settled):
        contract, (batch, _) = operation.eqn.params["dimension_numbers"]
        if not batch:
            side = 0 if left.settled else 1
            free = tuple(axis for axis in range(operation.inputs[side].aval.ndim) if axis not in contract[side])
            first = operation.results[0].aval.ndim - len(free) if side else 0
            return _met(operation, side, free, tuple(range(first, first + len(free))))
    return None


def _met(operation: Operation, side: int, axes: tuple[int, ...], own: tuple[int, ...]) -> Met:
    kernel, between = operation.inputs[side], list[Operation]()
    while kernel.operation is not None and kernel.operation.name in ("convert_element_type", "transpose", "rev"):
        if set(kernel.operation.eqn.params.get("dimensions", ())) & set(axes):
            break  # its outputs are reversed
        between.insert(0, kernel.operation)
        if kernel.operation.name == "transpose":
            axes = tuple(kernel.operation.eqn.params["permutation"][axis] for axis in axes)
        kernel = kernel.operation.inputs[0]
    return Met(kernel, axes, own, tuple(between), side)


def used_once(met: Met, uses: Counter[int]) -> bool:
    """Whether the kernel goes nowhere else, neither as it is nor cast or transposed."""
    return all(uses[id(x)] == 1 for x in (met.kernel, *(step.results[0] for step in met.between)))


def moved(own: Sequence[int], operation: Operation) -> tuple[int, ...]:
    """Where axes of an operand are in the result of an operation that may transpose it."""
    if operation.name != "transpose":
        return tuple(own)
    return tuple(operation.eqn.params["permutation"].index(axis) for axis in own)


def _follow(y: Value, uses: Counter[int], users: dict[int, list[Operation]]) -> list[tuple[Operation, Value]]:
    """The operations behind `y` that are affine in it, each with its result."""
    path: list[tuple[Operation, Value]] = []
    while uses[id(y)] == 1 and id(y) in users:
        operation = users[id(y)][0]
        others = [x for x in operation.inputs if x is not y]
        affine = operation.name in _AFFINE and len(others) == 1 and others[0].settled
        affine &= operation.name != "div" or operation.inputs[0] is y
        if not affine and operation.name not in ("convert_element_type", "transpose"):
            break
        y = operation.results[0]
        path.append((operation, y))
    return path


def of_params(values: Sequence[Value]) -> list[Value]:
    """The parameters that values are made of."""
    found: dict[int, Value] = {}

    def walk(x: Value) -> None:
        if x.leaf is not None:
            found[id(x)] = x
        elif x.operation is not None:
            for y in x.operation.inputs:
                walk(y)

    for x in values:
        walk(x)
    return list(found.values())


def _parameters(path: list[tuple[Operation, Value]]) -> list[Value]:
    return of_params([x for step, _ in path for x in step.inputs if x.settled])


def _shortened(
    path: list[tuple[Operation, Value]], uses: Counter[int]
) -> tuple[list[Value], list[tuple[Operation, Value]]]:
    """The chain up to where a parameter comes in that is used elsewhere too."""
    for end in range(len(path), -1, -1):
        parts = _parameters(path[:end])
        if all(uses[id(x)] == 1 for x in parts):
            return parts, path[:end]
    return [], []


def _chain(
    path: list[tuple[Operation, Value]],
    start: Value,
    met: Met,
    parts: list[Value],
    names: Sequence[str],
    leaves: Sequence[Any],
) -> Chain | None:
    """What the chain does, from its values and derivatives; `None` if it is not channel by channel."""
    shape, end = start.aval.shape, met.own
    for operation, _ in path:
        end = moved(end, operation)
    outputs = tuple(shape[axis] for axis in met.own)
    known = {names[x.leaf]: jnp.asarray(leaves[x.leaf]) for x in parts if x.leaf is not None}
    if any(x.size != math.prod(outputs) for x in known.values()):
        return None

    def run(y: Array, changed: dict[str, Array]) -> Array:
        now = {**known, **changed}
        env = {id(start): jnp.broadcast_to(_exact(along(y, met.own, len(shape))), shape)}

        def value(x: Value) -> Any:
            if id(x) not in env:
                if x.leaf is not None:
                    env[id(x)] = _exact(now[names[x.leaf]])
                elif x.operation is None:
                    env[id(x)] = _exact(x.known)
                elif x.operation.name == "convert_element_type" and _is_float(x.aval):
                    env[id(x)] = _exact(value(x.operation.inputs[0]))
                else:
                    env[id(x)] = rebound(x.operation.eqn, [value(y) for y in x.operation.inputs])
            return env[id(x)]

        out = value(path[-1][1]) if path else env[id(start)]
        channels = out[tuple(slice(None) if axis in end else 0 for axis in range(len(shape)))]
        return jnp.transpose(channels, [sorted(end).index(axis) for axis in end])

    nothing, ones = jnp.zeros(outputs), jnp.ones(outputs)
    slope = run(ones, {}) - run(nothing, {})
    # another number a channel, the first 0: what belongs to places and not to channels is told from it
    probe = (jnp.arange(math.prod(outputs)) / max(1, math.prod(outputs) - 1)).reshape(outputs)
    probe = probe if probe.size > 1 else ones
    scales, before, after = [], {}, {}
    for name, x in known.items():
        along_x = (x,), (probe.reshape(x.shape).astype(x.dtype),)
        shift = jax.jvp(lambda x, name=name: run(nothing, {name: x}), *along_x)[1]
        steeper = jax.jvp(lambda x, name=name: run(ones, {name: x}) - run(nothing, {name: x}), *along_x)[1]
        given = along_x[1][0].reshape(outputs).astype(slope.dtype)
        if bool(jnp.any(jnp.abs(steeper) > 1e-6)):
            scales.append(name)
        elif (sign := _sign(shift, given)) is not None:
            after[name] = sign
        elif (sign := _sign(shift, slope * given)) is not None:
            before[name] = sign
        else:
            return None
    return Chain(met.axes, slope, tuple(scales), before, after, run)


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _exact(x: Any) -> Array:
    """A number in at least float32: what the chain does is asked without its casts."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if _is_float(x) else x


def _sign(x: Array, like: Array) -> float | None:
    """1 or -1, if `x` is `like` or minus it."""
    return next((sign for sign in (1.0, -1.0) if bool(jnp.allclose(x, sign * like, rtol=1e-4, atol=1e-6))), None)


def rebound(eqn: Any, inputs: Sequence[Any]) -> Any:
    """The equation's primitive on other operands."""
    return eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
