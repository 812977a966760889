import dataclasses
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

Optimizer: TypeAlias = optax.GradientTransformation | optax.MultiSteps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that one training step turns into the next: a pytree, so it is sharded, saved and restored as a whole.

    `TrainState.create` makes one. `make_step` donates it: after `state, metrics = step(state, batch)` the old state's
    buffers are gone.
    """

    step: jax.Array
    """int32 scalar: how many steps have been taken."""
    params: Any
    """The tree that is trained. Its floating-point leaves get gradients; others (the integers or 8-bit floats of a
    compressed weight) stay as they are. What trains along with a student, such as a hint's regressor, stands in the
    same tree."""
    opt_state: Any
    """The optimizer's state, for the floating-point leaves of `params`."""
    extras: Any
    """What the loss carries from step to step without a gradient: batch statistics, a moving average of the params."""
    key: jax.Array
    """The typed key of the whole run. It never changes: a step's own key is this one with the step folded in."""

    @classmethod
    def create(cls, params: Any, tx: Optimizer, *, key: jax.Array, extras: Any = None) -> "TrainState":
        """A state at step 0. It owns its buffers: `params`, `extras` and `key` are copied and outlive its donation.

        Under `jax.jit(..., out_shardings=shardings(...))` nothing is copied, and each device makes only its own part.

        Args:
          params: the tree to train.
          tx: the optimizer, as handed to `make_step`.
          key: a typed PRNG key, `jax.random.key(seed)`.
          extras: mutable collections, such as Linen's `{"batch_stats": ...}`; `{}` by default.

        Raises:
          ValueError: `params` has no floating-point leaf to train.
          TypeError: `key` is not one typed key.
        """
        dtype = getattr(key, "dtype", None)
        if dtype is None or not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) or key.shape != ():
            raise TypeError(f"key must be one typed PRNG key, as jax.random.key(seed) makes; got {key!r}")
        params = jax.tree.map(owned, params)
        trained, _ = split(params)
        if not jax.tree.leaves(trained):
            raise ValueError(
                f"nothing to train: of the {len(jax.tree.leaves(params))} leaves of params, none is a float array"
            )
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=jax.tree.map(owned, tx.init(trained)),  # some optimizers keep the params themselves
            extras=jax.tree.map(owned, {} if extras is None else extras),
            key=owned(key),
        )


def split(params: Any) -> tuple[Any, Any]:
    """(the leaves that get gradients, the others), each with `None` where the other has a leaf."""
    return eqx.partition(params, _is_trained)


def _is_trained(x: Any) -> bool:
    # an 8-bit float is a code, as an integer is: an optimizer's moments underflow in it, and its updates become NaN
    return eqx.is_inexact_array(x) and x.dtype.itemsize > 1


def owned(x: Any) -> jax.Array:
    """A copy with a dtype of its own: a weak one would make the second step compile again."""
    return strong(jnp.array(x, copy=True))


def strong(x: jax.Array) -> jax.Array:
    """`x` without weak typing."""
    return jnp.asarray(x, x.dtype) if getattr(x, "weak_type", False) else x
