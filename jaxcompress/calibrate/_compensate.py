"""Changing the weights of one input after the other, while those of later inputs make up for the error.

The part that SparseGPT (Frantar & Alistarh 2023) and GPTQ (Frantar et al. 2023) share, both after Optimal Brain Surgeon
(Hassibi & Stork 1993). For `|x W - x W'|^2` over inputs with Gram matrix `H`, setting row `j` of `W` to `q` costs least
if each later row `k` moves by `-U[j, k] (W[j] - q) / U[j, j]`, where `U` is upper triangular and `U^T U` the inverse of
`H`: the rows before `j` are settled, and row `j` of `U` is, but for its scale, that of the inverse of the rest of `H`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

D = TypeVar("D")

_HIGHEST = lax.Precision.HIGHEST


def inverse_factor(
    gram: Float[Array, "inputs inputs"], damping: float | Array
) -> tuple[Float[Array, "inputs inputs"], Bool[Array, " inputs"]]:
    """The upper triangular `U` with `U^T U = inverse(gram + damping * mean(diagonal) * I)`, and which inputs are dead.

    A dead input was zero in every row. It stands apart from the others, as if its mean square were theirs.

    Args:
      gram: sum of outer products of the inputs; symmetric.
      damping: relative to the mean of the diagonal over inputs that are not dead.

    Returns:
      `U`, not finite if `gram` with its damping is not positive definite in float32; and the mask of dead inputs.
    """
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    mean = jnp.sum(diagonal) / jnp.maximum(1, jnp.sum(~dead))
    mean = jnp.where(mean > 0, mean, 1.0)
    scaled = gram / mean + jnp.diag(damping + dead.astype(gram.dtype))  # of order 1, whatever the inputs' scale
    # scaled = R R^T with R upper triangular is the Cholesky factor read backwards, and U = inverse(R)
    upper = lax.linalg.cholesky(scaled[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jax.scipy.linalg.solve_triangular(upper, identity, lower=False) / jnp.sqrt(mean), dead


def check_compensation(damping: float, block_size: int) -> None:
    """Raises ValueError for numbers that `inverse_factor` and `compensated` can't work with."""
    if not 0 < damping < jnp.inf or block_size < 1:
        raise ValueError(f"damping must be positive and block_size at least 1, got {damping} and {block_size}")


def check_settled(name: str, settled: Array, damping: float) -> None:
    """Raises ValueError, naming the weight, if its concrete settled values show that the damping was too small."""
    if not bool(jnp.all(jnp.isfinite(settled))):
        raise ValueError(
            f"the Gram matrix of the inputs of {name!r} is not positive definite in float32 with "
            f"damping={damping}: raise the damping, or calibrate on more batches"
        )


def compensated(
    weight: Float[Array, "inputs outputs"],
    factor: Float[Array, "inputs inputs"],
    decide: Callable[[Array, Array, Array], D],
    settle: Callable[[Array, D, Array], Array],
    *,
    group: int,
    block: int,
) -> tuple[Float[Array, "inputs outputs"], D]:
    """Settles the weights input by input, each input's error taken up by the inputs after it.

    Outputs don't depend on each other here (only through `decide`): a weight that is divided among devices along its
    outputs stays so.

    Args:
      weight: a matrix; `x @ weight` is what is to change least.
      factor: of the inputs, from `inverse_factor`.
      decide: `(rows, diagonal, index) -> decision` for each group of neighbouring inputs as it is reached: its weights
        as they are by then, `[group, outputs]`; `factor`'s diagonal, `[group]`, NaN where the last group is filled up;
        the group's number.
      settle: `(row, decision, i) -> row`: the final weights of the group's input `i`, `[outputs]`.
      group: inputs that are decided about together; the last group is filled up.
      block: inputs after which the later ones are brought up to date in one product; rounded up to whole groups.

    Returns:
      The settled matrix, and the decisions, stacked along a new leading axis.
    """
    inputs = weight.shape[0]
    groups = -(-min(block, inputs) // group)
    block = groups * group
    blocks = -(-inputs // block)
    fill = blocks * block - inputs
    weight = jnp.pad(weight, [(0, fill), (0, 0)])
    diagonal = jnp.pad(jnp.diagonal(factor), (0, fill), constant_values=jnp.nan)
    factor = jnp.pad(factor, [(0, fill), (0, fill)])
    places = jnp.arange(blocks * block)

    def settle_block(weight: Array, b: Array) -> tuple[Array, D]:
        start = b * block
        rows = lax.dynamic_slice_in_dim(factor, start, block)  # [block, inputs]
        own = lax.dynamic_slice_in_dim(rows, start, block, axis=1)  # [block, block]
        scale = lax.dynamic_slice_in_dim(diagonal, start, block)

        def settle_group(state: tuple[Array, Array], g: Array) -> tuple[tuple[Array, Array], D]:
            first = g * group
            now = lax.dynamic_slice_in_dim(state[0], first, group)
            decision = decide(now, lax.dynamic_slice_in_dim(scale, first, group), b * groups + g)

            def settle_row(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
                current, errors = state
                j = first + i
                row = current[j]
                final = settle(row, decision, i)
                error = jnp.where(jnp.isnan(scale[j]), 0.0, (row - final) / scale[j])
                current = (current - own[j][:, None] * error).at[j].set(final)
                return current, errors.at[j].set(error)

            return lax.fori_loop(0, group, settle_row, state), decision

        current = lax.dynamic_slice_in_dim(weight, start, block)
        (current, errors), decisions = lax.scan(settle_group, (current, jnp.zeros_like(current)), jnp.arange(groups))
        later = jnp.where(places >= start + block, rows, 0.0)
        weight = lax.dynamic_update_slice_in_dim(weight, current, start, axis=0)
        return weight - jnp.matmul(later.T, errors, precision=_HIGHEST), decisions

    weight, decisions = lax.scan(settle_block, weight, jnp.arange(blocks))
    return weight[:inputs], jax.tree.map(_merge_leading, decisions)


def _merge_leading(x: Any) -> Any:
    return x.reshape(-1, *x.shape[2:])
