"""Products of 8-bit floats: a weight in a small float type that rounds the inputs it meets to one, too."""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jaxtyping import Array, ArrayLike, Float

from jaxcompress.arrays import Leaf, Quantized, compressed, register
from jaxcompress.arrays._inputs import to_small_floats
from jaxcompress.arrays._products import ON_THE_WAY, Dims, along_output, register_product
from jaxcompress.arrays._stacks import take_parts
from jaxcompress.quantize._fake import FakeQuantized


class FloatProduct(Leaf):
    """`values * scale`, whose inputs are rounded to small floats where they meet it: of `Floats(..., inputs=...)`.

    A GPU or TPU gets the product of the 8-bit floats, summed in float32; a CPU, which has none, that of their values.
    """

    values: Float[Array, "*shape"]
    scale: Float[Array, "*blocks"]
    compute_dtype: str = eqx.field(static=True)
    """The dtype of the array that this stands for."""
    input_dtype: str = eqx.field(static=True)
    """Of the inputs, after each row was divided by its own scale."""

    def aval(self) -> ShapedArray:
        return ShapedArray(self.values.shape, jnp.dtype(self.compute_dtype))

    def materialise(self) -> Array:
        """The rounded weight."""
        return (self.values.astype(jnp.float32) * self.scale).astype(self.compute_dtype)

    def alone(self) -> Quantized:
        """The rounded weight, which leaves inputs as they are."""
        return Quantized(
            values=self.values,
            scale=self.scale,
            zero_point=None,
            bits=8,
            length=None,
            compute_dtype="float32",
            strict=self.strict,
        )

    def view(self) -> FakeQuantized:
        """As it is in training, which does the same wherever a weight may stand."""
        return FakeQuantized(self.materialise(), self.input_dtype)


@register_product(FloatProduct)
def _dot(x: Array, w: FloatProduct, dims: Dims, params: dict[str, Any]) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating) or _varies(w.scale, dims.w_contract):
        dot = functools.partial(lax.dot_general, dimension_numbers=dims.numbers)
        return compressed(dot)(x, w.view())
    codes, step = to_small_floats(x, w.input_dtype, (*dims.x_batch, *dims.x_free(x.ndim)))

    def product(codes: Array, values: Any) -> Array:
        return lax.dot_general(codes, values, dims.numbers, preferred_element_type=jnp.float32)

    def scaled(codes: Array, w: FloatProduct) -> Array:
        scale = along_output(w.scale, dims.w_contract, dims.w_batch, before=len(dims.x_free(x.ndim)), after=0)
        return product(codes, w.values) * scale

    def as_numbers(codes: Array, w: FloatProduct) -> Array:
        return compressed(product)(codes.astype(jnp.float32), w.alone())

    sums = lax.platform_dependent(codes, w, cpu=as_numbers, default=scaled)
    step = along_output(step, dims.x_contract, dims.x_batch, before=0, after=len(dims.w_free(w.ndim)))
    return (sums * step).astype(params["preferred_element_type"] or x.dtype)


def _varies(scale: Array, axes: Sequence[int]) -> bool:
    return any(scale.shape[axis] > 1 for axis in axes)


def _as_its_view(primitive: Any) -> None:
    @register(primitive)
    def _alone(w: FloatProduct, **params: Any) -> Any:
        return compressed(functools.partial(primitive.bind, **params))(w.view())


for _primitive in set(ON_THE_WAY) - {lax.squeeze_p}:  # which `take_parts` has a rule for
    _as_its_view(_primitive)
take_parts(FloatProduct)


@register(lax.conv_general_dilated_p)
def _conv(x: ArrayLike, w: FloatProduct, **params: Any) -> Any:
    return compressed(functools.partial(lax.conv_general_dilated_p.bind, **params))(jnp.asarray(x), w.view())


@register(lax.gather_p)
def _gather(w: FloatProduct, indices: ArrayLike, **params: Any) -> Any:
    return lax.gather_p.bind(w.materialise(), jnp.asarray(indices), **params)
