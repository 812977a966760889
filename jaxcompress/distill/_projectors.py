"""Learned maps from the student's features to the shape of the teacher's: regressors, adaptation layers.

A projector is a pair of plain functions over a parameter pytree. Its parameters belong to the training state, beside
the student's: optimized, sharded and saved with them, and left behind when the student is exported.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Projector(NamedTuple):
    """`init(key)` makes the parameters, `apply(params, student)` the features to compare with the teacher's."""

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


def dense_projector(features_in: int, features_out: int, *, bias: bool = True) -> Projector:
    """A linear map of the last axis: `x @ kernel + bias`, for vectors, tokens and pixels alike.

    TinyBERT's projection of hidden states (312 to 768) is this, shared by all layers; on NHWC maps it is a 1x1
    convolution.

    Args:
      features_in: the last axis of the student's features.
      features_out: the last axis of the teacher's.
      bias: add one.

    Returns:
      A `Projector` with parameters `{"kernel": [in, out], "bias": [out]}`.
    """

    def init(key: jax.Array) -> dict[str, jax.Array]:
        kernel = jax.random.normal(key, (features_in, features_out)) / math.sqrt(features_in)
        return {"kernel": kernel, "bias": jnp.zeros(features_out)} if bias else {"kernel": kernel}

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ params["kernel"] + params.get("bias", 0)

    return Projector(init, apply)


def conv_projector(
    student_shape: tuple[int, int, int], teacher_shape: tuple[int, int, int], *, batch_norm: bool = False
) -> Projector:
    """A convolution from the student's map to the teacher's size and channels.

    The regressor of Romero et al., "FitNets: hints for thin deep nets", 2015, section 2.3, chosen by the two sizes:
    equal, a 1x1 convolution; student twice the teacher, 3x3 with stride 2; student larger otherwise, a kernel that
    covers the difference, without padding; teacher twice the student, a transposed 4x4 convolution with stride 2.

    Args:
      student_shape: `(height, width, channels)` of the student's map.
      teacher_shape: the same of the teacher's.
      batch_norm: normalise the result over the batch (by this batch's statistics) and apply a ReLU, as some
        implementations do.

    Returns:
      A `Projector` with parameters `{"kernel": HWIO, "bias": [out]}`, and `"scale"`, `"offset"` `[out]` with
      `batch_norm`.

    Raises:
      ValueError: neither of the four relations holds; resize the student's map first.
    """
    window = _window(student_shape[:2], teacher_shape[:2])
    channels_in, channels_out = student_shape[2], teacher_shape[2]

    def init(key: jax.Array) -> dict[str, jax.Array]:
        fan_in = math.prod(window.size) * channels_in
        kernel = jax.random.normal(key, (*window.size, channels_in, channels_out)) * math.sqrt(2 / fan_in)
        params = {"kernel": kernel, "bias": jnp.zeros(channels_out)}
        if batch_norm:
            params |= {"scale": jnp.ones(channels_out), "offset": jnp.zeros(channels_out)}
        return params

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        padding = ((window.padding, window.padding),) * 2
        y = convolve(x, params["kernel"], window.stride, padding, window.dilation) + params["bias"]
        return jax.nn.relu(_batch_norm(y) * params["scale"] + params["offset"]) if batch_norm else y

    return Projector(init, apply)


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Any = "SAME", dilation: int = 1) -> jax.Array:
    """`x` `[batch, height, width, in]` with a kernel HWIO, in the wider of their dtypes, as `@` has it."""
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    return jax.lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        (stride,) * 2,
        padding,
        lhs_dilation=(dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class _Window(NamedTuple):
    size: tuple[int, int]
    stride: int = 1
    padding: int = 0
    dilation: int = 1  # of the input: a transposed convolution


def _window(student: tuple[int, int], teacher: tuple[int, int]) -> _Window:
    pairs = list(zip(student, teacher, strict=True))
    if all(s == 2 * t for s, t in pairs):
        return _Window((3, 3), stride=2, padding=1)
    if all(2 * s == t for s, t in pairs):
        return _Window((4, 4), padding=2, dilation=2)
    if all(s >= t for s, t in pairs):
        return _Window((1 + student[0] - teacher[0], 1 + student[1] - teacher[1]))
    raise ValueError(
        f"no single convolution leads from a {student[0]}x{student[1]} map to {teacher[0]}x{teacher[1]}: the student's "
        "must be equal, larger or exactly half; resize it with jax.image.resize first"
    )


def _batch_norm(x: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    mean = jnp.mean(x, axis=(0, 1, 2))
    variance = jnp.mean((x - mean) ** 2, axis=(0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(variance + epsilon)


def variational_projector(channels_in: int, channels_out: int, *, initial_variance: float = 5.0) -> Projector:
    """The regressor of variational information distillation: three 1x1 convolutions with ReLUs between, no biases.

    Ahn et al., "Variational information distillation for knowledge transfer", 2019, section 3. `apply` gives the
    mean; the parameters also hold the `log_scale` of each channel's variance, for `variational_information_loss`.

    Args:
      channels_in: the student's channels.
      channels_out: the teacher's.
      initial_variance: of every channel.

    Returns:
      A `Projector` with parameters `{"w1": [in, out], "w2": [out, out], "w3": [out, out], "log_scale": [out]}`.
    """

    def init(key: jax.Array) -> dict[str, jax.Array]:
        widths = ((channels_in, channels_out), (channels_out, channels_out), (channels_out, channels_out))
        keys = jax.random.split(key, 3)
        params = {
            f"w{i}": jax.random.normal(k, shape) * math.sqrt(2 / shape[0])
            for i, (k, shape) in enumerate(zip(keys, widths, strict=True), 1)
        }
        return params | {"log_scale": jnp.full(channels_out, math.log(math.expm1(initial_variance - 1e-5)))}

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jax.nn.relu(jax.nn.relu(x @ params["w1"]) @ params["w2"]) @ params["w3"]

    return Projector(init, apply)
