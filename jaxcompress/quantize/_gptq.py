"""GPTQ: rounding a trained model's weights to their grid so that what each layer gives changes little."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.calibrate import InputObserver, InputStatistics, Layout
from jaxcompress.calibrate._compensate import check_compensation, check_settled, compensated, inverse_factor
from jaxcompress.calibrate._meshes import in_place
from jaxcompress.paths import Rules
from jaxcompress.quantize._affine import Affine
from jaxcompress.quantize._rounding import matrix_grid, rounded_by


def gptq(
    fn: Callable[[Any, Any], Any] | InputObserver,
    params: Any,
    batches: Iterable[Any],
    rules: Rules[Affine | None],
    *,
    damping: float = 0.01,
    block_size: int = 128,
    by_energy: bool = False,
) -> Any:
    """`convert`, with weights rounded so that, over the batches, the outputs of each layer change little.

    GPTQ (Frantar et al. 2023, algorithm 1). The grid of each weight is the one that `convert` gives it. Its weights are
    rounded input by input, and the error of each is taken up by the weights of later inputs before these are rounded:
    with `H` the inputs' Gram matrix and `U^T U` the inverse of its damped form, by `-U[j, k] / U[j, j]` of the error.

        small = quantize.gptq(lambda v, x: model.apply(v, x), variables, batches, {"kernel$": quantize.Affine(4)})

    Dense kernels of any rank, weights stacked by `scan`, convolutions with groups and without; see
    `calibrate.input_statistics` for what the function may contain. Inputs are measured in the float model. Of a pruned
    model zeros take up errors too, and some become other values; `convert` keeps them all.

    Args:
      fn: `fn(params, batch)`, the model, or a `calibrate.InputObserver` of it, which is compiled once for many calls.
      params: a tree of arrays.
      batches: calibration data: some hundred examples or more, like those of training.
      rules: by path, the grid; see `convert`.
      damping: added to the Gram matrix's diagonal, relative to its mean.
      block_size: inputs after which the later ones are brought up to date.
      by_energy: round the inputs of the largest sum of squares first ("activation order"), which helps at few bits.

    Returns:
      `params` with `Quantized` leaves.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError, TypeError: as `convert`; and for inputs that can't be measured or are not finite, or a Gram matrix
        that needs more damping. Nothing is converted then.
    """
    check_compensation(damping, block_size)

    def codes(name: str, weight: Array, seen: InputStatistics, spec: Affine) -> Array:
        rounded = functools.partial(_gptq, layout=seen.layout, spec=spec, block=block_size, by_energy=by_energy)
        found = in_place(rounded, weight, seen.gram, damping)
        check_settled(name, found, damping)
        return found

    return rounded_by(codes, fn, params, batches, rules)


@functools.partial(jax.jit, static_argnames=("layout", "spec", "block", "by_energy"))
def _gptq(
    weight: Float[Array, "*shape"],
    gram: Float[Array, "problems inputs inputs"],
    damping: float,
    *,
    layout: Layout,
    spec: Affine,
    block: int,
    by_energy: bool,
) -> Float[Array, "*shape"]:
    """The integer codes, as floats; not finite if the damping is too small."""
    low, high = spec.limits

    def round_matrix(matrix: Array, gram: Array, scale: Array, zero: Array) -> Array:
        inputs = matrix.shape[0]
        order = jnp.argsort(-jnp.diagonal(gram), stable=True) if by_energy else jnp.arange(inputs)
        matrix, gram, scale, zero = matrix[order], gram[order][:, order], scale[order], zero[order]
        factor, _ = inverse_factor(gram, damping)

        def decide(rows: Array, diagonal: Array, index: Array) -> tuple[Array, Array]:
            j = jnp.minimum(index, inputs - 1)
            return scale[j], zero[j]

        def settle(row: Array, grid: tuple[Array, Array], i: Array) -> Array:
            step, middle = grid
            return step * (jnp.clip(jnp.round(row / step) + middle, low, high) - middle)

        final, _ = compensated(matrix, factor, decide, settle, group=1, block=block)
        codes = jnp.round(final / scale) + zero
        return codes[jnp.argsort(order)]

    steps, zeros = matrix_grid(weight, spec, layout)
    return layout.weight(jax.vmap(round_matrix)(layout.matrices(weight.astype(jnp.float32)), gram, steps, zeros))
