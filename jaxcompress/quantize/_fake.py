"""Fake quantization during training: a function transform that rounds what the integers will round."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays import Leaf, compressed, is_leaf, quantize_input, register
from jaxcompress.arrays._inputs import along_input, input_limits, reshaped_input
from jaxcompress.arrays._products import ON_THE_WAY, Dims
from jaxcompress.arrays._stacks import take_parts
from jaxcompress.paths import Rules, match, named_leaves, with_leaves
from jaxcompress.quantize._affine import Affine, check_entries, fake_quantize
from jaxcompress.quantize._convert import Scheme, check_scheme, named
from jaxcompress.quantize._live import with_folded
from jaxcompress.quantize._ranges import Range, check_ranges, steps_of
from jaxcompress.quantize._steps import fake_small_floats, to_steps

P = ParamSpec("P")
R = TypeVar("R")


def fake(
    fn: Callable[P, R],
    rules: Rules[Scheme | None],
    ranges: Mapping[str, Range] | None = None,
    *,
    fold: bool = False,
) -> Callable[P, R]:
    """`fn` with the weights that `rules` choose rounded to their grid, and the inputs that meet them too.

    The parameters stay floats, in their own tree: optimizer state and checkpoints don't change. Rounding happens
    inside, and gradients pass straight through it. Nothing else in the process is touched: another call of `fn`
    itself, a teacher's, say, is as it was. Steps that are themselves trained are `learn`'s.

    Args:
      fn: a function whose first argument is a tree of parameters: a Linen module's `apply`, a loss.
      rules: pairs of a path pattern and a `Scheme`, or `None`: leave alone. First match wins. `KMeans` is none of them:
        its values are made once, and trained as they are.
      ranges: of the inputs, from `input_ranges` with the same rules, as `static` takes them: what lies outside is
        clipped, and gets no gradient. Without, the inputs' steps are found as they come.
      fold: kernels with a normalisation behind them are rounded as they will be once it is folded into them (Jacob et
        al. 2018, section 3.2): `w * scale / sqrt(var + epsilon)` is on the grid, with the statistics that the function
        normalises by: in training those of the batch, which come from the kernel as it is. With running averages the
        integers are those of `convert(fold(fn, params, x), rules)`. The norms are found by tracing, in `jit` but not in
        `scan`, `cond` or `remat`. (With a step an output the integers are the same with and without.)

    Returns:
      A function of the same signature.

    Raises:
      UnmatchedRuleError: when called, if a rule matches no parameter.
      ValueError: when called, if the ranges don't fit the rules; with `fold`, if there is nothing to fold.
    """

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not args:
            raise TypeError("a fake-quantized function takes its parameters as the first positional argument")
        params, *rest = args
        leaves = named_leaves(params, is_leaf)
        specs = match(rules, [name for name, _ in leaves], None)
        if ranges is not None:
            asked = [n for (n, _), s in zip(leaves, specs, strict=True) if isinstance(s, Affine) and s.activation_bits]
            check_ranges(ranges, asked)
        by_name = dict(zip([name for name, _ in leaves], specs, strict=True))

        def view(name: str, x: Any) -> Any:
            return _view(name, x, by_name[name], None if ranges is None else ranges.get(name))

        if fold:
            chosen = {name: functools.partial(view, name) for name, spec in by_name.items() if spec is not None}
            return with_folded(fn, args, kwargs, chosen, view)
        viewed = with_leaves(params, [view(name, x) for name, x in leaves], is_leaf)
        on_leaves: Callable[..., R] = compressed(fn)
        return on_leaves(viewed, *rest, **kwargs)

    return run


def _view(name: str, weight: Any, spec: Scheme | None, low_high: Range | None) -> Any:
    if spec is None:
        return weight
    try:
        return _rounded_view(name, weight, spec, low_high)
    except (TypeError, ValueError) as error:
        raise named(error, name) from error


def _rounded_view(name: str, weight: Any, spec: Scheme, low_high: Range | None) -> Any:
    check_scheme(spec)
    if is_leaf(weight):
        raise TypeError(
            f"a {type(weight).__name__} weight is compressed already; fake quantization takes float weights"
        )
    if not jnp.issubdtype(jnp.result_type(weight), jnp.floating):
        raise TypeError(f"it is of {jnp.result_type(weight)}; fake quantization takes float weights")
    check_entries(weight)
    if not isinstance(spec, Affine):
        rounded, inputs = _straight_through(weight, spec), getattr(spec, "inputs", None)  # those of `Floats`
        return rounded if inputs is None else FakeQuantized(rounded, inputs)
    rounded = fake_quantize(weight, spec)
    if spec.activation_bits is None:
        return rounded
    if low_high is None:
        return FakeQuantized(rounded, spec.activation_bits)
    return FakeQuantized(rounded, spec.activation_bits, *steps_of(name, low_high, rounded.ndim, spec.activation_bits))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _straight_through(weight: Array, scheme: Scheme) -> Array:
    return jnp.asarray(scheme.convert(weight).materialise())


_straight_through.defvjp(
    lambda weight, scheme: (_straight_through(weight, scheme), None), lambda scheme, _, cotangent: (cotangent,)
)


class FakeQuantized(Leaf):
    """A weight on its grid that also rounds the input it meets. Lives only inside a transformed function."""

    weight: Array
    activation_bits: int | str = eqx.field(static=True)
    """Of the inputs' integers; or the 8-bit float type that they are rounded to."""
    input_step: Array | None = None
    """float32, of the weight's rank, 1 along all axes but stacked ones; `None`: found as inputs come."""
    input_zero_point: Array | None = None
    """The integer that means zero, as float32; `None` for a symmetric grid."""
    input_rule: str | None = eqx.field(static=True, default=None)
    """Of the step's gradient, as in `to_steps`."""

    def aval(self) -> ShapedArray:
        return ShapedArray(self.weight.shape, self.weight.dtype)

    def materialise(self) -> Array:
        return self.weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def fake_quantize_input(x: Array, bits: int, keep: tuple[int, ...]) -> Array:
    """An activation rounded to a symmetric grid with a step of its own along the `keep` axes; straight through."""
    codes, step = quantize_input(x, bits, keep)
    return (codes * step).astype(x.dtype)


def _fake_input_fwd(x: Array, bits: int, keep: tuple[int, ...]) -> tuple[Array, None]:
    return fake_quantize_input(x, bits, keep), None


def _fake_input_bwd(bits: int, keep: tuple[int, ...], _: None, cotangent: Array) -> tuple[Array]:
    return (cotangent,)


fake_quantize_input.defvjp(_fake_input_fwd, _fake_input_bwd)


def _rounded(x: ArrayLike, w: FakeQuantized, keep: tuple[int, ...], dims: Dims, shared: tuple[int, ...]) -> Array:
    """The input on the grid that the weight asks for; `shared` are the axes of the features that one row has."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if isinstance(w.activation_bits, str):
        return fake_small_floats(x, w.activation_bits, keep)
    if w.input_step is None:
        return fake_quantize_input(x, w.activation_bits, keep)
    laid = [None if a is None else along_input(a, dims, x.ndim) for a in (w.input_step, w.input_zero_point)]
    if laid[0] is None:
        raise ValueError(f"the inputs' steps {w.input_step.shape} of a stacked weight meet inputs of {x.shape} at once")
    limits = input_limits(w.activation_bits, w.input_zero_point is not None)
    return to_steps(x, laid[0], laid[1], limits, w.input_rule, math.prod(x.shape[axis] for axis in shared))


@register(lax.dot_general_p)
def _dot_input_weight(x: ArrayLike, w: FakeQuantized, **params: Any) -> Array:
    return lax.dot_general_p.bind(_dot_input(x, w, Dims.of(params["dimension_numbers"])), w.weight, **params)


@register(lax.dot_general_p)
def _dot_weight_input(w: FakeQuantized, x: ArrayLike, **params: Any) -> Array:
    x = _dot_input(x, w, Dims.of(params["dimension_numbers"], weight_first=True))
    return lax.dot_general_p.bind(w.weight, x, **params)


def _dot_input(x: ArrayLike, w: FakeQuantized, dims: Dims) -> Array:
    keep = tuple(axis for axis in range(jnp.ndim(x)) if axis not in dims.x_contract)
    return _rounded(x, w, keep, dims, dims.x_contract)


@register(lax.conv_general_dilated_p)
def _conv(x: ArrayLike, w: FakeQuantized, **params: Any) -> Array:
    batch = params["dimension_numbers"].lhs_spec[0]
    rest = tuple(axis for axis in range(jnp.ndim(x)) if axis != batch)
    return lax.conv_general_dilated_p.bind(_rounded(x, w, (batch,), Dims((), (), (), ()), rest), w.weight, **params)


def _still_a_weight(primitive: Any) -> None:
    """A weight that only changes its shape or its dtype on the way to a product is still a weight there."""

    @register(primitive)
    def _(w: FakeQuantized, **params: Any) -> FakeQuantized:
        weight = primitive.bind(w.weight, **params)

        def follow(per_layer: Array | None) -> Array | None:
            if per_layer is None:
                return None
            if primitive is lax.transpose_p:
                return jnp.transpose(per_layer, params["permutation"])
            followed = reshaped_input(per_layer, w.shape, weight.shape)
            if followed is None:
                raise ValueError(f"the inputs' steps {per_layer.shape} can't follow a weight to {weight.shape}")
            return followed

        return FakeQuantized(
            weight, w.activation_bits, follow(w.input_step), follow(w.input_zero_point), w.input_rule, strict=w.strict
        )


for _primitive in set(ON_THE_WAY) - {lax.squeeze_p}:  # which `take_parts` has a rule for
    _still_a_weight(_primitive)
take_parts(FakeQuantized)


@register(lax.gather_p)
def _gather(w: FakeQuantized, indices: ArrayLike, **params: Any) -> Array:
    return lax.gather_p.bind(w.weight, indices, **params)
