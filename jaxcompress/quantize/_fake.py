"""Fake quantization during training: a function transform that rounds what the integers will round."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import primitives
from jaxtyping import Array, ArrayLike

from jaxcompress.arrays import Leaf, compressed, is_leaf, quantize_input, register
from jaxcompress.paths import Rules, assign
from jaxcompress.quantize._affine import Affine, fake_quantize
from jaxcompress.quantize._convert import Scheme

P = ParamSpec("P")
R = TypeVar("R")


def fake(fn: Callable[P, R], rules: Rules[Affine | Scheme | None]) -> Callable[P, R]:
    """`fn` with the weights that `rules` choose rounded to their grid, and the inputs that meet them too.

    The parameters stay floats, in their own tree: optimizer state and checkpoints don't change. Rounding happens
    inside, and gradients pass straight through it. Nothing else in the process is touched: another call of `fn`
    itself, a teacher's, say, is as it was.

    Args:
      fn: a function whose first argument is a tree of parameters: a Linen module's `apply`, a loss.
      rules: pairs of a path pattern and an `Affine`, or a `Scheme` that converts under jit (`Binary`, `Ternary`), or
        `None`: leave alone. First match wins.

    Returns:
      A function of the same signature.

    Raises:
      UnmatchedRuleError: when called, if a rule matches no parameter.
    """

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not args:
            raise TypeError("a fake-quantized function takes its parameters as the first positional argument")
        params, *rest = args
        specs = assign(rules, params, is_leaf=is_leaf)
        viewed = jax.tree.map(_view, params, specs, is_leaf=is_leaf)
        return compressed(fn)(viewed, *rest, **kwargs)  # type: ignore[arg-type]

    return run


def _view(weight: Any, spec: Affine | Scheme | None) -> Any:
    if spec is None:
        return weight
    if is_leaf(weight):
        raise TypeError(
            f"a {type(weight).__name__} weight is compressed already; fake quantization takes float weights"
        )
    if not isinstance(spec, Affine):
        return _straight_through(weight, spec)
    rounded = fake_quantize(weight, spec)
    return rounded if spec.activation_bits is None else FakeQuantized(rounded, spec.activation_bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _straight_through(weight: Array, scheme: Scheme) -> Array:
    return jnp.asarray(scheme.convert(weight).materialise())


_straight_through.defvjp(
    lambda weight, scheme: (_straight_through(weight, scheme), None), lambda scheme, _, cotangent: (cotangent,)
)


class FakeQuantized(Leaf):
    """A weight on its grid that also rounds the input it meets. Lives only inside a transformed function."""

    weight: Array
    activation_bits: int = eqx.field(static=True)

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


def _rounded(x: ArrayLike, bits: int, contracted: tuple[int, ...]) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return fake_quantize_input(x, bits, tuple(axis for axis in range(x.ndim) if axis not in contracted))


@register(lax.dot_general_p)
def _dot_input_weight(x: ArrayLike, w: FakeQuantized, **params: Any) -> Array:
    x = _rounded(x, w.activation_bits, params["dimension_numbers"][0][0])
    return lax.dot_general_p.bind(x, w.weight, **params)


@register(lax.dot_general_p)
def _dot_weight_input(w: FakeQuantized, x: ArrayLike, **params: Any) -> Array:
    x = _rounded(x, w.activation_bits, params["dimension_numbers"][0][1])
    return lax.dot_general_p.bind(w.weight, x, **params)


@register(lax.conv_general_dilated_p)
def _conv(x: ArrayLike, w: FakeQuantized, **params: Any) -> Array:
    batch = params["dimension_numbers"].lhs_spec[0]
    x = _rounded(x, w.activation_bits, tuple(axis for axis in range(jnp.ndim(x)) if axis != batch))
    return lax.conv_general_dilated_p.bind(x, w.weight, **params)


def _still_a_weight(primitive: Any) -> None:
    """A weight that only changes its shape or its dtype on the way to a product is still a weight there."""

    @register(primitive)
    def _(w: FakeQuantized, **params: Any) -> FakeQuantized:
        return FakeQuantized(primitive.bind(w.weight, **params), w.activation_bits)


for _primitive in (
    lax.transpose_p,
    lax.reshape_p,
    lax.squeeze_p,
    lax.rev_p,
    lax.convert_element_type_p,
    primitives.sharding_constraint_p,
):
    _still_a_weight(_primitive)


@register(lax.gather_p)
def _gather(w: FakeQuantized, indices: ArrayLike, **params: Any) -> Array:
    return lax.gather_p.bind(w.weight, indices, **params)
