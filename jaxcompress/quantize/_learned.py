"""What weights are rounded to, learned with them: steps (LSQ, and PACT for the inputs), and three values (TTQ)."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jaxtyping import Array, ArrayLike, Float

from jaxcompress.arrays import Codebook, Leaf, Quantized, compressed, is_leaf, register
from jaxcompress.arrays._inputs import input_limits, whole
from jaxcompress.arrays._products import ON_THE_WAY
from jaxcompress.arrays._stacks import PARTS
from jaxcompress.paths import Rules, match, named_leaves, with_leaves
from jaxcompress.quantize._affine import Affine, _over_blocks, _spread, check_float
from jaxcompress.quantize._codebook import Ternary
from jaxcompress.quantize._convert import named
from jaxcompress.quantize._fake import FakeQuantized
from jaxcompress.quantize._ranges import Range, check_ranges, steps_of
from jaxcompress.quantize._steps import to_steps


class Trained(Leaf):
    """A float weight that is rounded wherever it is used, with what it is rounded to, all of them trained.

    It stands in the tree of parameters where its weight stood, as a pytree of float arrays: gradients, optimizers and
    checkpoints take it as it is. `compressed(fn)` rounds the weight.
    """

    def view(self) -> Array | FakeQuantized:
        """What stands for the weight during one call."""
        return jnp.asarray(self.materialise())

    def unshared(self, length: int) -> Any:
        """Where layers share what is learned, the weight is rounded before `scan` slices it: as `settled` does."""
        if length == 1 or all(child.shape[0] == length for child in jax.tree.leaves(self)):
            return self
        seen = self.view()
        return seen.unshared(length) if isinstance(seen, Leaf) else seen

    def settled(self) -> Leaf:
        """The compressed leaf of what was trained; each kind has its own."""
        raise NotImplementedError


class Learned(Trained):
    """A float weight with the steps that it and its inputs are rounded to, all of them trained.

    Their paths end with `/weight`, `/step` and `/input_step`, for rules of sharding or weight decay. `compressed(fn)`
    rounds the weight, and the inputs where they meet it.
    """

    weight: Float[Array, "*shape"]
    step: Float[Array, "*blocks"]
    """Of the weight's grid, one a block, of the weight's rank."""
    input_step: Float[Array, "*stack"] | None
    """Of the inputs' grid, or its largest value where `input_rule` is "pact"; of the weight's rank. `None`: dynamic."""
    input_low: Float[Array, "*stack"] | None
    """The smallest value of the inputs' grid; `None`: zero where `unsigned`, else the largest with its sign turned."""
    bits: int = eqx.field(static=True)
    symmetric: bool = eqx.field(static=True)
    group: tuple[int, int] | None = eqx.field(static=True)
    activation_bits: int | None = eqx.field(static=True)
    input_rule: str | None = eqx.field(static=True)
    """How the inputs' step learns: "lsq", "pact", or not at all."""
    unsigned: bool = eqx.field(static=True)
    """Whether all integers of the inputs' grid are for what is not negative."""

    def aval(self) -> ShapedArray:
        return ShapedArray(self.weight.shape, self.weight.dtype)

    def materialise(self) -> Array:
        """The rounded weight."""
        spec, step = self._spec(), _spread(positive(self.step), self.weight.shape, self._spec())
        count = self.weight.size // max(1, self.step.size)
        return to_steps(self.weight, step, None, spec.limits, "lsq", count)

    def view(self) -> Array | FakeQuantized:
        """What stands for the weight during one call."""
        weight = self.materialise()
        if self.activation_bits is None:
            return weight
        if self.input_step is None:
            return FakeQuantized(weight, self.activation_bits)
        return FakeQuantized(weight, self.activation_bits, *self.input_grid(), input_rule=self.input_rule)

    def input_grid(self) -> tuple[Array, Array | None]:
        """Step and zero point (not rounded; `None` for a symmetric grid) of the inputs, of the weight's rank."""
        assert self.activation_bits is not None and self.input_step is not None
        low, high = self._input_limits()
        step = positive(self.input_step)
        if low == -high:
            return step / high if self.input_rule == "pact" else step, None
        least = jnp.zeros_like(step) if self.input_low is None else jnp.minimum(self.input_low, 0.0)
        step = (step - least) / (high - low) if self.input_rule == "pact" else step
        return step, low - least / step

    def _input_limits(self) -> tuple[int, int]:
        assert self.activation_bits is not None
        return input_limits(self.activation_bits, self.unsigned or self.input_low is not None)

    def settled(self) -> Quantized:
        """The weight as integers on the steps that were learned."""
        low, high = self._spec().limits
        step = positive(self.step)
        codes = jnp.round(self.weight.astype(jnp.float32) / _spread(step, self.weight.shape, self._spec()))
        input_scale, input_zero = (None, None) if self.input_step is None else self.input_grid()
        return Quantized.from_codes(
            jnp.clip(codes, low, high),
            step,
            bits=next(bits for bits in (2, 4, 8) if self.bits <= bits),
            dtype=self.weight.dtype,
            group=self.group,
            activation_bits=self.activation_bits,
            input_scale=input_scale,
            input_zero_point=None if input_zero is None else whole(input_zero, self._input_limits()),
        )

    def _spec(self) -> Affine:
        return Affine(self.bits, group=self.group, symmetric=self.symmetric)


def learn(
    params: Any,
    rules: Rules[Affine | Ternary | None],
    ranges: Mapping[str, Range] | None = None,
    *,
    inputs: Literal["lsq", "pact"] | None = "lsq",
) -> Any:
    """`params` with the chosen weights as `Learned` leaves, whose steps are trained with everything else.

    Under a `Ternary` rule two values are learned instead, with the weights that choose between them (`LearnedTernary`).

    Learned step size quantization (Esser et al. 2020): `q = round(clip(w / s, -Qn, Qp)) s`, whose gradient to `s` is
    `round(w/s) - w/s` inside and the limit outside, times `1 / sqrt(n Qp)` for `n` weights (or features) a step. The
    step begins as LSQ+ has it (Bhalgat et al. 2020), at `(|mean w| + 3 std w) / 2 ** (bits - 1)`: LSQ's `2 mean|w| /
    sqrt(Qp)` is too large with 4 bits. Of inputs between ends that are no mirror images the lower end is learned too,
    as in LSQ+.

        ranges = quantize.input_ranges(model.apply, params, batches, rules, quantize.LeastSquares(), symmetric=False)
        params = quantize.learn(params, rules, ranges)
        loss = compressed(lambda params, x, labels: ...model.apply(params, x)...)  # and train it as ever
        small = quantize.settle(params)  # Quantized leaves: what was trained, as integers

    Args:
      params: a tree of arrays.
      rules: by path, the grid, or a `Ternary`. `symmetric=False` uses the smallest integer too, as the paper does: with
        2 bits, four values instead of three. There is no zero point then either.
      ranges: where the inputs' steps begin, from `input_ranges` with the same rules; without, the inputs of rules with
        `activation_bits` get steps as they come. Inputs that are never negative get all integers for what is positive.
      inputs: how the inputs' steps learn. "pact": the ends are learned, from what is clipped only (Choi et al. 2018,
        equation 3, has the upper one, and a weight decay on it: the leaf's `input_step`). `None`: they stay.

    Raises:
      UnmatchedRuleError: a rule matches no parameter.
      ValueError, TypeError: ranges that don't fit the rules; a weight that can't be quantized, named by its path.
    """
    if inputs not in ("lsq", "pact", None):
        raise ValueError(f"inputs is 'lsq', 'pact' or None, got {inputs!r}")
    leaves = named_leaves(params, is_leaf)
    specs = match(rules, [name for name, _ in leaves], None)
    if ranges is not None:
        asked = [n for (n, _), s in zip(leaves, specs, strict=True) if isinstance(s, Affine) and s.activation_bits]
        check_ranges(ranges, asked)
    made = [
        x if spec is None else _learned(name, x, spec, None if ranges is None else ranges.get(name), inputs)
        for (name, x), spec in zip(leaves, specs, strict=True)
    ]
    return with_leaves(params, made, is_leaf)


def settle(params: Any) -> Any:
    """`params` with each leaf of `learn` as what it was trained to round to: a `Quantized` leaf, or a `Codebook`."""
    return jax.tree.map(lambda x: x.settled() if isinstance(x, Trained) else x, params, is_leaf=is_leaf)


def positive(step: Array) -> Array:
    """A step as it is used: training may carry it through zero."""
    return jnp.maximum(jnp.abs(step), 1e-30)


def _learned(name: str, weight: Any, spec: Any, low_high: Range | None, rule: str | None) -> Trained:
    if not isinstance(spec, Affine | Ternary):
        raise TypeError(f"{name!r}: steps are learned of an Affine grid, values of a Ternary; got the rule {spec!r}")
    if is_leaf(weight):
        raise TypeError(f"{name!r} is a {type(weight).__name__} already; steps are learned of float weights")
    try:
        weight = check_float(weight)
        if isinstance(spec, Ternary):
            return LearnedTernary.of(weight, spec)
        step = _first_step(weight.astype(jnp.float32), spec)
    except (TypeError, ValueError) as error:
        raise named(error, name) from error
    unsigned, input_step, input_low = False, None, None
    if low_high is not None:
        input_step, zero = steps_of(name, low_high, weight.ndim, spec.activation_bits or 8)
        low, high = input_limits(spec.activation_bits or 8, zero is not None)
        unsigned = bool(np.all(low_high.low >= 0) and np.any(low_high.high > 0))
        if zero is not None and not unsigned:
            input_low = (low - zero) * input_step
        if rule == "pact":
            input_step = input_step * (high - (0 if zero is None else zero))
    return Learned(
        weight=weight,
        step=step,
        input_step=input_step,
        input_low=input_low,
        bits=spec.bits,
        symmetric=spec.symmetric,
        group=None if spec.group is None else (spec.group[0] % weight.ndim - weight.ndim, spec.group[1]),
        activation_bits=spec.activation_bits,
        input_rule=None if low_high is None else rule,
        unsigned=unsigned,
    )


def _first_step(weight: Array, spec: Affine) -> Array:
    mean = _over_blocks(jnp.mean, weight, spec)
    deviation = jnp.sqrt(_over_blocks(jnp.mean, (weight - _spread(mean, weight.shape, spec)) ** 2, spec))
    step = (jnp.abs(mean) + 3 * deviation) / 2 ** (spec.bits - 1)
    return jnp.where(step > 1e-30, step, 1.0)


class LearnedTernary(Trained):
    """A float weight that is `high`, zero or `-low`, as it is above, below or between two thresholds; all are trained.

    Trained ternary quantization (Zhu et al. 2017, equations 7 and 8): a value gets the sum of the gradients of the
    weights that have it, here times `1 / sqrt(n)` for the `n` weights of a block, as learned steps do: under SGD the
    sum alone needs a rate of its own, and at that of the weights training comes apart (to Adam it is the same). The
    weight's own is scaled by its value, so that weights cross the thresholds as training goes on. Paths end with
    `/weight`, `/high` and `/low`.
    """

    weight: Float[Array, "*shape"]
    high: Float[Array, "*blocks"]
    """What is above the threshold, one a block, of the weight's rank."""
    low: Float[Array, "*blocks"]
    """Minus what is below the negative threshold."""
    threshold: float = eqx.field(static=True)
    """In units of the block's mean magnitude, as of `Ternary`. (The paper's is 0.05 of the largest.)"""

    @classmethod
    def of(cls, weight: Array, scheme: Ternary) -> "LearnedTernary":
        """A leaf that begins with the means of what is above and below."""
        values = dataclasses.replace(scheme, signed=True).convert(weight).centroids
        return cls(weight=weight, high=values[..., 1], low=-values[..., 2], threshold=scheme.threshold)

    def aval(self) -> ShapedArray:
        return ShapedArray(self.weight.shape, self.weight.dtype)

    def materialise(self) -> Array:
        """The rounded weight."""
        return _to_three(self.weight, self.high, self.low, self.threshold)

    def settled(self) -> Codebook:
        """The weight on the values that were learned: two bits each, zero being index 0."""
        above, below = _sides(self.weight, self.high, self.threshold)
        centroids = jnp.stack([jnp.zeros_like(self.high), self.high, -self.low], axis=-1)
        return Codebook.from_indices(jnp.where(above, 1, jnp.where(below, 2, 0)), centroids, keep_zeros=True)


def _sides(weight: Array, high: Array, threshold: float) -> tuple[Array, Array]:
    """What is above the threshold, and what is below its negative."""
    over = tuple(axis for axis in range(weight.ndim) if high.shape[axis] == 1)
    level = threshold * jnp.mean(jnp.abs(weight.astype(jnp.float32)), axis=over, keepdims=True)
    return weight > level, weight < -level


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _to_three(weight: Array, high: Array, low: Array, threshold: float) -> Array:
    above, below = _sides(weight, high, threshold)
    return jnp.where(above, high, jnp.where(below, -low, 0)).astype(weight.dtype)


def _to_three_bwd(threshold: float, kept: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, Array]:
    weight, high, low = kept
    above, below = _sides(weight, high, threshold)
    over = tuple(axis for axis in range(weight.ndim) if high.shape[axis] == 1)

    shared = max(1, weight.size // max(1, high.size))

    def of_side(side: Array) -> Array:
        total = jnp.sum(jnp.where(side, cotangent, 0).astype(jnp.float32), axis=over, keepdims=True)
        return (total / math.sqrt(shared)).astype(high.dtype)

    slope = jnp.where(above, high, jnp.where(below, low, 1))
    return (cotangent * slope).astype(weight.dtype), of_side(above), -of_side(below)


_to_three.defvjp(lambda *args: (_to_three(*args), args[:3]), _to_three_bwd)


def _as_its_view(primitive: Any) -> None:
    def run(params: Any, *operands: Any) -> Any:
        viewed = [x.view() if isinstance(x, Trained) else x for x in operands]
        return compressed(functools.partial(primitive.bind, **params))(*viewed)

    @register(primitive)
    def _alone(w: Trained, **params: Any) -> Any:
        return run(params, w)

    if primitive is lax.dynamic_slice_p:

        @register(primitive)
        def _from(w: Trained, *starts: ArrayLike, **params: Any) -> Any:
            return run(params, w, *starts)

    if primitive in (lax.dot_general_p, lax.conv_general_dilated_p):

        @register(primitive)
        def _behind(x: ArrayLike, w: Trained, **params: Any) -> Any:
            return run(params, x, w)

    if primitive in (lax.dot_general_p, lax.gather_p):

        @register(primitive)
        def _in_front(w: Trained, x: ArrayLike, **params: Any) -> Any:
            return run(params, w, x)


for _primitive in (lax.dot_general_p, lax.conv_general_dilated_p, lax.gather_p, *PARTS, *ON_THE_WAY):
    _as_its_view(_primitive)
