"""AdaRound: whether each weight is rounded down or up is learned, so that what its layer gives changes little."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxcompress.calibrate import InputObserver, InputStatistics, Layout
from jaxcompress.calibrate._meshes import in_place
from jaxcompress.paths import Rules
from jaxcompress.quantize._affine import Affine
from jaxcompress.quantize._rounding import matrix_grid, rounded_by

_LOW, _HIGH = -0.1, 1.1  # the stretched sigmoid's ends (Louizos et al. 2018)


def adaround(
    fn: Callable[[Any, Any], Any] | InputObserver,
    params: Any,
    batches: Iterable[Any],
    rules: Rules[Affine | None],
    *,
    steps: int = 1000,
    rate: float = 1e-2,
    strength: float = 1.0,
) -> Any:
    """`convert`, with each weight rounded down or up so that, over the batches, the outputs of its layer change least.

    AdaRound (Nagel et al. 2020, equation 21): `w' = s clip(floor(w / s) + h(v), low, high)`, with `h` a sigmoid that
    is stretched and clipped to [0, 1], is trained by Adam on `|x w - x w'|^2` and a penalty on `h` away from 0 and 1.
    The first term needs no more of the inputs than their Gram matrix. An output keeps round to nearest where that is
    better in the end, so none gets worse. (The paper's reconstruction includes the nonlinearity; here it does not.)

    Args:
      fn: `fn(params, batch)`, the model, or a `calibrate.InputObserver` of it.
      params: a tree of arrays.
      batches: calibration data.
      rules: by path, the grid; see `convert`.
      steps: of Adam; the penalty comes in after a fifth of them, and sharpens from a power of 20 to 2.
      rate: Adam's.
      strength: of the penalty, where the first term is in units of one weight's squared step and mean input energy.

    Returns:
      `params` with `Quantized` leaves.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError, TypeError: as `gptq`.
    """
    if steps < 1 or not rate > 0 or strength < 0:
        raise ValueError(f"want at least 1 step, a positive rate and no negative strength: {steps}, {rate}, {strength}")

    def codes(name: str, weight: Array, seen: InputStatistics, spec: Affine) -> Array:
        return in_place(
            functools.partial(_rounded, layout=seen.layout, spec=spec, steps=steps), weight, seen.gram, rate, strength
        )

    return rounded_by(codes, fn, params, batches, rules)


@functools.partial(jax.jit, static_argnames=("layout", "spec", "steps"))
def _rounded(
    weight: Float[Array, "*shape"],
    gram: Float[Array, "problems inputs inputs"],
    rate: float,
    strength: float,
    *,
    layout: Layout,
    spec: Affine,
    steps: int,
) -> Float[Array, "*shape"]:
    """The integer codes, as floats."""
    low, high = spec.limits
    matrices, (step, middle) = layout.matrices(weight.astype(jnp.float32)), matrix_grid(weight, spec, layout)
    exact = matrices / step + middle
    below = jnp.floor(exact)
    energy = jnp.mean(jnp.diagonal(gram, axis1=1, axis2=2), axis=1)[:, None, None]
    gram = gram / jnp.where(energy > 0, energy, 1.0)
    unit = jnp.sqrt(jnp.mean(step * step))

    def errors(codes: Array) -> Array:
        """Of each output, `[problems, outputs]`."""
        off = (jnp.clip(codes, low, high) - exact) * step / unit
        return jnp.sum(off * jnp.einsum("pij,pjo->pio", gram, off, precision=lax.Precision.HIGHEST), axis=1)

    def raised(v: Array) -> Array:
        return jnp.clip(jax.nn.sigmoid(v) * (_HIGH - _LOW) + _LOW, 0, 1)

    def loss(v: Array, at: Array) -> Array:
        power = 2 + 18 * (1 - jnp.clip((at - 0.2) / 0.8, 0, 1))
        penalty = jnp.sum(1 - jnp.abs(2 * raised(v) - 1) ** power)
        return jnp.sum(errors(below + raised(v))) + jnp.where(at < 0.2, 0.0, strength) * penalty

    tx = optax.adam(rate)
    share = jnp.clip((exact - below - _LOW) / (_HIGH - _LOW), 1e-3, 1 - 1e-3)
    start = jnp.log(share / (1 - share))  # where h is the weight's own fraction

    def train(carry: Any, at: Array) -> Any:
        v, state = carry
        updates, state = tx.update(jax.grad(loss)(v, at), state, v)
        return (v + updates, state), None

    (v, _), _ = lax.scan(train, (start, tx.init(start)), jnp.arange(steps) / steps)
    learned, plain = below + (raised(v) > 0.5), jnp.round(matrices / step) + middle
    better = (errors(learned) < errors(plain))[:, None, :]
    return layout.weight(jnp.clip(jnp.where(better, learned, plain), low, high))
