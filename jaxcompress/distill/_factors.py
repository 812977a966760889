"""Factor transfer: the teacher's features paraphrased by an autoencoder, the student's translated to match."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import feature_pair, keep
from jaxcompress.distill._projectors import Projector, convolve
from jaxcompress.distill._safe import flat, scaled, unit


def factor_transfer_loss(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    order: float = 1,
    collapse_channels: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The mean of `|f_s / ||f_s|| - f_t / ||f_t|| |^order` over an example's factors.

    Kim, Park and Kwak, "Paraphrasing complex network: network compression via factor transfer", 2018: the
    teacher's factors come from its paraphraser, the student's from its translator. The paper flattens the whole
    factor; with `collapse_channels` the mean of squares over channels comes first, as one implementation has it.

    Args:
      student: `[batch, height, width, channels]`, the translator's output.
      teacher: the same shape, the paraphraser's; constant.
      order: 1 or more.
      collapse_channels: compare maps instead of whole factors.
      where: `[batch]`, which examples count.

    Returns:
      One value an example, `[batch]`.
    """
    if order < 1:
        raise ValueError(f"order must be 1 or more, got {order}")
    pair = feature_pair(student, teacher, where, same_shape=True)
    if collapse_channels:
        a, b = (jnp.mean(scaled(x, (1, 2, 3))[0] ** 2, axis=-1) for x in pair)
    else:
        a, b = pair
    difference = jnp.abs(unit(flat(a)) - unit(flat(b)))
    return keep(jnp.mean(difference**order, axis=-1), where)


class Paraphraser(NamedTuple):
    """A convolutional autoencoder: `init(key)` makes its parameters."""

    init: Callable[[jax.Array], Any]
    encode: Callable[[Any, jax.Array], jax.Array]  # params, the teacher's map -> its factors
    decode: Callable[[Any, jax.Array], jax.Array]  # params, factors -> the map again


def paraphraser(channels: int, factors: int) -> Paraphraser:
    """The teacher's autoencoder of factor transfer: three 3x3 convolutions to `factors` channels, three back.

    Kim, Park and Kwak, "Paraphrasing complex network: network compression via factor transfer", 2018, section 3.1 (here
    without batch normalisation). Train it first, on the teacher's maps alone, by
    `hint_loss(decode(params, encode(params, f)), f)`; then hold it, and give `encode(params, f)` to
    `factor_transfer_loss`.

    Args:
      channels: of the teacher's map.
      factors: channels of the factors; the paper has half the teacher's.

    Returns:
      A `Paraphraser`; maps keep their size.
    """
    widths = (channels, channels, factors, factors, factors, channels, channels)

    def init(key: jax.Array) -> list[dict[str, jax.Array]]:
        return _convolutions(key, widths)

    def encode(params: Any, x: jax.Array) -> jax.Array:
        return _convolve(params[:3], x)

    def decode(params: Any, x: jax.Array) -> jax.Array:
        return _convolve(params[3:], x, last_is_linear=True)

    return Paraphraser(init, encode, decode)


def translator(channels: int, factors: int) -> Projector:
    """The student's side of factor transfer: three 3x3 convolutions from its `channels` to the teacher's `factors`."""

    def init(key: jax.Array) -> list[dict[str, jax.Array]]:
        return _convolutions(key, (channels, channels, factors, factors))

    return Projector(init, _convolve)


def _convolutions(key: jax.Array, widths: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"kernel": jax.random.normal(k, (3, 3, n, m)) * math.sqrt(2 / (9 * n)), "bias": jnp.zeros(m)}
        for k, n, m in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def _convolve(params: Any, x: jax.Array, last_is_linear: bool = False) -> jax.Array:
    for i, layer in enumerate(params):
        x = convolve(x, layer["kernel"]) + layer["bias"]
        if not (last_is_linear and i == len(params) - 1):
            x = jax.nn.leaky_relu(x, 0.1)
    return x
