"""Rules of the primitives that work index by index: the labels of the operands must agree, axis by axis.

They also say where a slice that is zero stays zero (`0 * x`, `max(0, x)`, `tanh(0)`), which decides whether a sum over
it is exact. Where all operands hold numbers that are known (zero, `0 + eps`, `exp(0)`), the result's is computed, for
what is cut may not become infinite or NaN in the zeroed model (`0 / 0`, `log(0)`): no later zero undoes that.

JAX lets operands have no axes, or axes of size 1, where the result has more: these have no say.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.prune.channels._labels import Label
from jaxcompress.prune.channels._tape import Call, Step, Tracer, Value, concrete, rule

_PASSES = (
    "copy copy_p device_put layout_constraint mesh_cast name optimization_barrier pvary reduced_pvary reshard "
    "sharding_constraint stop_gradient"
)
_ZERO_TO_ZERO = (
    "abs asin asinh atan atanh cbrt ceil conj erf erf_inv expm1 floor imag log1p neg population_count real round sign "
    "sin sinh sqrt square tan tanh"
)
_OTHER_UNARY = (
    "acos acosh bessel_i0e bessel_i1e clz cos cosh digamma erfc exp exp2 is_finite lgamma log logistic not rsqrt"
)
_ZERO_IF_ALL_ARE = "add add_any complex nextafter or shift_left shift_right_arithmetic shift_right_logical sub xor"
_OTHER_NARY = (
    "atan2 eq eq_to ge gt igamma igamma_grad_a igammac le le_to lt lt_to ne polygamma pow random_fold_in "
    "regularized_incomplete_beta rem threefry2x32 zeta"
)
_STEEP = {"acos", "acosh", "asin", "atan2", "cbrt", "pow", "sqrt"}  # finite, where their derivative need not be


def _by_index(*names: str) -> Callable[[Any], Any]:
    """Register a label function of primitives that work index by index, and follow the numbers that cut slices hold."""

    def register(label: Callable[[Tracer, Call], list[Value]]) -> Any:
        @functools.wraps(label)
        def labelled(tracer: Tracer, call: Call) -> list[Value]:
            outs = label(tracer, call)
            if len(outs) == 1 and not jnp.issubdtype(outs[0].dtype, jax.dtypes.extended):
                _follow(tracer, call, outs[0])
            return outs

        return rule(*names)(labelled)

    return register


def _follow(tracer: Tracer, call: Call, out: Value) -> None:
    zero, held = list(out.zero), [None] * out.ndim
    for axis, label in enumerate(out.labels):
        numbers = [_number(x, axis, out.shape) for x in call.inputs] if label is not None else [None]
        if call.name in _STEEP and not tracer.in_derivative and None not in numbers and _is_steep(call, numbers):
            why = f"the derivative of {call.name!r} is not finite where the unit is zero"
            tracer.steep.append((label, f"the zeroed model's gradient may not be finite: {why}"))
        if any(x is None for x in numbers) or (zero[axis] and not any(numbers) and call.name != "div"):
            continue
        number = _evaluated(call, numbers)
        if np.all(np.isfinite(number)):
            held[axis] = number
            continue
        zero[axis] = False
        if not tracer.in_derivative:
            tracer.contract(label, False, f"is not finite in {call.name!r} where the unit is zero")
    out.zero, out.held = tuple(zero), tuple(held)


def _number(x: Value, axis: int, shape: tuple[int, ...]) -> Any:
    """What an operand holds where the result's axis is cut; `None` if that isn't one known number."""
    if x.ndim == len(shape) and x.shape[axis] == shape[axis]:
        found = 0 if x.zero[axis] else x.held[axis] if x.held else None
        if found is not None:
            return np.asarray(found, x.dtype)
    return _everywhere(x)


def _everywhere(x: Value) -> Any:
    """The number that a known value holds everywhere, if that is seen at once."""
    if x.whole is not None:
        return _everywhere(x.whole)
    if x.known and x.ndim == 0:
        return concrete(x)
    if x.made_by is not None and x.made_by.primitive.name == "broadcast_in_dim":
        return _everywhere(x.made_by.inputs[0])
    return None


_numbers: dict[Any, Any] = {}


def _evaluated(call: Call, numbers: list[Any]) -> Any:
    """The primitive of scalars; each is computed once, for a model asks the same again and again."""
    key = (call.name, str(call.params), *((x.dtype, x.tobytes()) for x in numbers))
    if key not in _numbers:
        with jax.core.eval_context():
            found = call.primitive.bind(*numbers, **call.primitive.get_bind_params(call.params))
        _numbers[key] = np.asarray(found)
    return _numbers[key]


def _is_steep(call: Call, numbers: list[Any]) -> bool:
    """Whether a derivative of the primitive, by an operand that is no constant, is not finite there."""
    inputs = [i for i, x in enumerate(numbers) if jnp.issubdtype(x.dtype, jnp.inexact)]
    inputs = [i for i in inputs if _everywhere(call.inputs[i]) is None]
    if not inputs:
        return False
    key = (call.name, "slope", *inputs, *((x.dtype, x.tobytes()) for x in numbers))
    if key not in _numbers:
        with jax.core.eval_context():
            slopes = jax.grad(lambda *x: jnp.real(call.primitive.bind(*x, **call.params)), inputs)(*numbers)
        _numbers[key] = not all(bool(jnp.isfinite(x)) for x in slopes)
    return _numbers[key]


@_by_index("convert_element_type", "reduce_precision")
@rule(*_PASSES.split())
def _pass(tracer: Tracer, call: Call) -> list[Value]:
    """Operand by operand: `jax.device_put` of a tree is one call."""
    pairs = zip(call.avals, call.inputs, strict=True)
    return [tracer.value(aval, x.labels, x.zero, source=x.source, summed=x.summed, held=x.held) for aval, x in pairs]


@_by_index(*_ZERO_TO_ZERO.split())
def _zero_to_zero(tracer: Tracer, call: Call) -> list[Value]:
    (x,) = call.inputs
    return [tracer.value(call.avals[0], x.labels, x.zero)]


@_by_index("integer_pow")
def _integer_pow(tracer: Tracer, call: Call) -> list[Value]:
    (x,) = call.inputs
    return [tracer.value(call.avals[0], x.labels, x.zero if call.params["y"] > 0 else None)]


@_by_index(*_OTHER_UNARY.split())
def _other_unary(tracer: Tracer, call: Call) -> list[Value]:
    return [tracer.value(call.avals[0], call.inputs[0].labels)]


@rule("bitcast_convert_type")
def _bitcast(tracer: Tracer, call: Call) -> list[Value]:
    (x,), (aval,) = call.inputs, call.avals
    if aval.shape != x.shape:
        tracer.freeze(x, range(x.ndim), "bits are read as another number of values")
        return [tracer.value(aval)]
    return [tracer.value(aval, x.labels, x.zero)]


@_by_index(*_ZERO_IF_ALL_ARE.split())
def _sum_like(tracer: Tracer, call: Call) -> list[Value]:
    zero = [all(_zero(x, axis, call) for x in call.inputs) for axis in range(len(call.avals[0].shape))]
    if len(call.inputs) == 2:
        _mark(tracer, call, "shift")
    return [tracer.value(call.avals[0], aligned(tracer, call), zero)]


@_by_index("mul", "and")
def _product_like(tracer: Tracer, call: Call) -> list[Value]:
    zero = [any(_zero(x, axis, call) for x in call.inputs) for axis in range(len(call.avals[0].shape))]
    _mark(tracer, call, "scale")
    sources = [x.source for x in call.inputs if x.source is not None]
    scaled = len(sources) == 1 and any(x.ndim == 0 for x in call.inputs)
    return [tracer.value(call.avals[0], aligned(tracer, call), zero, source=sources[0] if scaled else None)]


@_by_index("div")
def _div(tracer: Tracer, call: Call) -> list[Value]:
    x, by = call.inputs
    zero = [_zero(x, axis, call) and not _zero(by, axis, call) for axis in range(len(call.avals[0].shape))]
    mean = x.summed is not None and by.ndim == 0 and (width := concrete(by)) is not None and width == x.summed[1]
    if mean:
        call.extra, call.run = x.summed, _mean
    return [tracer.value(call.avals[0], aligned(tracer, call), zero)]


@_by_index("max", "min")
def _extremum(tracer: Tracer, call: Call) -> list[Value]:
    def bounds(x: Value) -> bool:  # a constant beyond zero, on the side where zero wins
        constant = concrete(x) if x.ndim == 0 else None
        return constant is not None and bool(constant <= 0 if call.name == "max" else constant >= 0)

    axes = range(len(call.avals[0].shape))
    zero = [
        all(_zero(x, axis, call) or bounds(x) for x in call.inputs) and any(_zero(x, axis, call) for x in call.inputs)
        for axis in axes
    ]
    return [tracer.value(call.avals[0], aligned(tracer, call), zero)]


@_by_index("clamp")
def _clamp(tracer: Tracer, call: Call) -> list[Value]:
    low, x, high = call.inputs
    ends = [concrete(v) if v.ndim == 0 else None for v in (low, high)]
    through = ends[0] is not None and ends[1] is not None and bool(ends[0] <= 0 <= ends[1])
    return [tracer.value(call.avals[0], aligned(tracer, call), x.zero if through else None)]


@_by_index("select_n")
def _select(tracer: Tracer, call: Call) -> list[Value]:
    cases = call.inputs[1:]
    zero = [all(_zero(x, axis, call) for x in cases) for axis in range(len(call.avals[0].shape))]
    return [tracer.value(call.avals[0], aligned(tracer, call), zero)]


@_by_index(*_OTHER_NARY.split())
def _other_nary(tracer: Tracer, call: Call) -> list[Value]:
    labels = aligned(tracer, call)
    return [tracer.value(aval, labels if aval.shape == call.avals[0].shape else None) for aval in call.avals]


def aligned(tracer: Tracer, call: Call) -> list[Label]:
    """The labels of a result whose operands agree index by index."""
    shape, labels = call.avals[0].shape, []
    for axis, n in enumerate(shape):
        along = [x.labels[axis] for x in call.inputs if x.ndim == len(shape) and x.shape[axis] == n]
        for label in along[1:]:
            tracer.atoms.unify(along[0], label, f"meets a whole axis in {call.name!r}")
        labels.append(along[0] if along else None)
    return labels


def _zero(x: Value, axis: int, call: Call) -> bool:
    """Whether an operand is zero where the result's axis is cut."""
    shape = call.avals[0].shape
    has_axis = x.ndim == len(shape) and x.shape[axis] == shape[axis]
    return x.is_zero or (has_axis and x.zero[axis])


def _mark(tracer: Tracer, call: Call, role: str) -> None:
    a, b = call.inputs
    for x, other in ((a, b), (b, a)):
        if x.source is not None and other.source is None and other.ndim == x.ndim:
            for axis in range(x.ndim):
                tracer.mark(x, axis, role)


def _mean(runner: Any, step: Step, inputs: list[Any]) -> list[Any]:
    x, by = inputs
    labels, width = step.extra
    kept = runner.width(labels, width)
    return [step.primitive.bind(x, by if kept is None else by * 0 + kept, **step.params)]
