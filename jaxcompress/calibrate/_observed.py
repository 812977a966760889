"""A weight that sees the inputs it meets, and says what it saw through its gradient.

An `Observed` leaf holds a weight and zeros of the statistic's shape. Its product with an input is the plain product, as
a function with a custom derivative: whatever the cotangent of the output, the cotangent of the zeros is the statistic
of the input. Cotangents add up over uses, come back through `scan`, `remat`, `cond`, `vmap` and sharding, and XLA drops
the rest of the backward pass, of which nothing depends. The input's own cotangent must then be zeros in an array (a
symbolic zero would end the backward pass before it reaches the layers in front).
"""

import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import primitives
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays import Leaf, register
from jaxcompress.arrays._products import Dims, explicit_sharding, is_float
from jaxcompress.calibrate._layout import Layout, Step, viewed_shape
from jaxcompress.calibrate._meshes import replicated


@dataclasses.dataclass
class Uses:
    """What became of one weight while a function was traced."""

    layouts: list[Layout] = dataclasses.field(default_factory=list)  # one a product that can be measured
    other: list[str] = dataclasses.field(default_factory=list)  # primitives that it met otherwise


log: contextvars.ContextVar[dict[str, Uses] | None] = contextvars.ContextVar("log", default=None)
"""Uses by name, in the order of first use; set while a function is traced to find them."""


class Observed(Leaf):
    """A weight with the zeros that get its inputs' statistic as their gradient. Lives only inside a measurement."""

    weight: Array
    sums: Array | None
    """float32 `[*stack, problems, inputs, inputs]` or `[*stack, problems, inputs]`; `None` while uses are sought."""
    rows: Array | None
    """float32 `[*stack]`."""
    wanted: Array | None
    """bool `[*stack]`: whether to measure at all. `None`: yes."""
    name: str = eqx.field(static=True)
    token: int = eqx.field(static=True)
    """Another one for each search, so that nothing JAX or quax have cached serves it, and every use is seen."""
    whole: tuple[int, ...] = eqx.field(static=True)
    """The shape of the whole parameter, of which `scan` may have sliced off leading axes."""
    steps: tuple[Step, ...] = eqx.field(static=True, default=())
    """What was done to it so far, written for the whole parameter."""

    def aval(self) -> ShapedArray:
        return ShapedArray(self.weight.shape, self.weight.dtype)

    def materialise(self) -> Array:
        return self.weight

    @staticmethod
    def default(primitive: Any, values: Any, params: dict[str, Any]) -> Any:
        """Where it meets something else than a product, it is the array that it is."""
        for value in values:
            if isinstance(value, Observed):
                _note_other(value, primitive)
        return Leaf.default(primitive, values, params)

    @property
    def sliced(self) -> int:
        """How many leading axes `scan` has sliced off."""
        return len(viewed_shape(self.whole, self.steps)) - self.weight.ndim

    def after(self, weight: Array, kind: str, argument: tuple[int, ...]) -> "Observed":
        """The leaf after a step that made `weight` of its weight; `argument` speaks of the sliced weight."""
        lead, n = viewed_shape(self.whole, self.steps)[: self.sliced], self.sliced
        if kind == "reshape":
            lifted = (*lead, *argument)
        else:
            lifted = (*(range(n) if kind == "transpose" else ()), *(n + axis for axis in argument))
        return dataclasses.replace(self, weight=weight, steps=(*self.steps, (kind, lifted)))


def _note_other(w: Observed, primitive: Any) -> None:
    uses = log.get()
    if uses is not None:
        uses.setdefault(w.name, Uses()).other.append(primitive.name)


def _layout(
    w: Observed, batch: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...], groups: int = 1
) -> Layout:
    n = w.sliced
    batch, inputs, outputs = (tuple(n + axis for axis in axes) for axes in (batch, inputs, outputs))
    return Layout(w.whole, w.steps, n, batch, inputs, outputs, groups)


@dataclasses.dataclass(frozen=True, eq=False)
class _Meeting:
    """A product of an input and a weight, and what of the input is measured."""

    product: Callable[[Array, Array], Array]
    lay: Callable[[Array], Array]  # the input as [problems, inputs, *rows]
    x: Callable[[], Array]  # zeros like the input
    weight: Callable[[], Array]
    gram: bool

    def statistic(self, x: Array, wanted: Array | None) -> tuple[Array, Array]:
        """Over all rows: the sum of their outer products, or of their squares; and their number."""

        def measure(x: Array) -> tuple[Array, Array]:
            laid = self.lay(x).astype(jnp.float32)
            rows = tuple(range(2, laid.ndim))
            if not self.gram:
                return jnp.sum(laid * laid, axis=rows), number
            return lax.dot_general(laid, laid, ((rows, rows), ((0,), (0,))), precision=lax.Precision.HIGHEST), number

        def measure_wanted(x: Array, wanted: Array) -> tuple[Array, Array]:
            nothing = jnp.zeros((*shape[:2], shape[1]) if self.gram else shape[:2], jnp.float32), jnp.float32(0)
            return lax.cond(wanted, measure, lambda x: nothing, x)

        shape = jax.eval_shape(self.lay, jax.ShapeDtypeStruct(x.shape, x.dtype)).shape
        number = jnp.float32(math.prod(shape[2:]))
        return replicated(measure, x) if wanted is None else replicated(measure_wanted, x, wanted)


def _measured(
    x: Array, w: Observed, layout: Layout, product: Callable[[Array, Array], Array], lay: Callable[[Array], Array]
) -> Array:
    uses = log.get()
    if uses is not None:
        uses.setdefault(w.name, Uses()).layouts.append(layout)
    if w.sums is None:
        return product(x, w.weight)
    meeting = _Meeting(product, lay, _zeros(x), _zeros(w.weight), gram=w.sums.ndim == 3)
    return _meet(meeting, x, w.weight, w.sums, w.rows, w.wanted)


def _zeros(like: Array) -> Callable[[], Array]:
    return functools.partial(jnp.zeros, like.shape, like.dtype, out_sharding=explicit_sharding(like))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _meet(meeting: _Meeting, x: Array, weight: Array, sums: Array, rows: Array, wanted: Array | None) -> Array:
    return meeting.product(x, weight)


def _meet_fwd(
    meeting: _Meeting, x: Array, weight: Array, sums: Array, rows: Array, wanted: Array | None
) -> tuple[Array, Any]:
    if x.size <= sums.size:  # a recurrent cell: rather keep each step's inputs than a Gram matrix of each
        return meeting.product(x, weight), (x, wanted)
    return meeting.product(x, weight), (meeting.statistic(x, wanted), wanted)


def _meet_bwd(meeting: _Meeting, kept: Any, _: Array) -> Any:
    seen, wanted = kept
    sums, rows = seen if isinstance(seen, tuple) else meeting.statistic(seen, wanted)
    return meeting.x(), meeting.weight(), sums, rows, None


_meet.defvjp(_meet_fwd, _meet_bwd)


@register(lax.dot_general_p)
def _dot_input_weight(x: ArrayLike, w: Observed, **params: Any) -> Any:
    dims = Dims.of(params["dimension_numbers"])
    return _dot(jnp.asarray(x), w, dims, lambda x, weight: lax.dot_general_p.bind(x, weight, **params))


@register(lax.dot_general_p)
def _dot_weight_input(w: Observed, x: ArrayLike, **params: Any) -> Any:
    dims = Dims.of(params["dimension_numbers"], weight_first=True)
    return _dot(jnp.asarray(x), w, dims, lambda x, weight: lax.dot_general_p.bind(weight, x, **params))


def _dot(x: Array, w: Observed, dims: Dims, product: Callable[[Array, Array], Array]) -> Any:
    if not is_float(x):
        _note_other(w, lax.dot_general_p)
        return NotImplemented
    batch = sorted(zip(dims.w_batch, dims.x_batch, strict=True))
    inputs = sorted(zip(dims.w_contract, dims.x_contract, strict=True))
    free = dims.x_free(x.ndim)

    def lay(x: Array) -> Array:
        laid = jnp.transpose(x, (*(b for _, b in batch), *(i for _, i in inputs), *free))
        sizes = [math.prod(w.weight.shape[axis] for axis, _ in axes) for axes in (batch, inputs)]
        return laid.reshape(*sizes, *(x.shape[axis] for axis in free))

    layout = _layout(w, tuple(b for b, _ in batch), tuple(i for i, _ in inputs), dims.w_free(w.ndim))
    return _measured(x, w, layout, product, lay)


@register(lax.conv_general_dilated_p)
def _conv(x: ArrayLike, w: Observed, **params: Any) -> Any:
    x, numbers, groups = jnp.asarray(x), params["dimension_numbers"], params["feature_group_count"]
    if not is_float(x) or params["batch_group_count"] != 1:
        _note_other(w, lax.conv_general_dilated_p)
        return NotImplemented
    out, *inputs = numbers.rhs_spec  # of which the first are the channels, then the spatial axes
    size = tuple(w.shape[axis] for axis in inputs[1:])
    order = np.argsort(inputs)  # as the axes stand in the kernel

    def lay(x: Array) -> Array:
        patches = lax.conv_general_dilated_patches(
            jnp.transpose(x, numbers.lhs_spec),
            size,
            params["window_strides"],
            params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            precision=lax.Precision.HIGHEST,
        )  # [batch, channels * size, *space]
        split = patches.reshape(patches.shape[0], groups, w.shape[inputs[0]], *size, *patches.shape[2:])
        n = 2 + len(inputs)
        laid = jnp.transpose(split, (1, *(2 + order), 0, *range(n, split.ndim)))
        return laid.reshape(groups, -1, patches.shape[0], *patches.shape[2:])

    layout = _layout(w, (), tuple(sorted(inputs)), (out,), groups)
    return _measured(x, w, layout, lambda x, weight: lax.conv_general_dilated_p.bind(x, weight, **params), lay)


@register(lax.transpose_p)
def _transpose(w: Observed, *, permutation: tuple[int, ...]) -> Observed:
    return w.after(lax.transpose_p.bind(w.weight, permutation=permutation), "transpose", tuple(permutation))


@register(lax.rev_p)
def _rev(w: Observed, *, dimensions: tuple[int, ...]) -> Observed:
    return w.after(lax.rev_p.bind(w.weight, dimensions=dimensions), "rev", tuple(dimensions))


def _only_reshapes(primitive: Any) -> None:
    @register(primitive)
    def _(w: Observed, **params: Any) -> Any:
        new = primitive.bind(w.weight, **params)
        turned = primitive is lax.reshape_p and params.get("dimensions") is not None
        if turned or new.size != w.weight.size:
            _note_other(w, primitive)
            return NotImplemented
        return w.after(new, "reshape", new.shape)


for _primitive in (lax.reshape_p, lax.squeeze_p, lax.broadcast_in_dim_p):
    _only_reshapes(_primitive)


def _still_the_weight(primitive: Any) -> None:
    @register(primitive)
    def _(w: Observed, **params: Any) -> Observed:
        return dataclasses.replace(w, weight=primitive.bind(w.weight, **params))


for _primitive in (lax.convert_element_type_p, primitives.sharding_constraint_p, primitives.copy_p):
    _still_the_weight(_primitive)
