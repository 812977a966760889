"""Values of the smaller model that are computed once; XLA's CPU computes some of them again for every use.

XLA puts elementwise operations into the loops that read their results. One that reads a single whole array (`z + bias`,
`relu(z)`) it copies into each of those loops, with everything that stands before it: in a stream of residuals
`x = x + f(x) + bias` every reader adds up all layers again. One that reads two it does not copy. So what should be
computed once ends with `max(z, min(z, 0))`, which changes nothing. (`optimization_barrier` is gone before XLA fuses.)
"""

import math
from collections import Counter

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.prune.channels._tape import Step, Tape, Value

SMALLEST = 1 << 10
"""Values of fewer elements are left: computing them again costs nothing."""

_ELEMENTWISE = (
    "abs add add_any ceil clamp convert_element_type copy cos div erf exp exp2 expm1 floor integer_pow log log1p "
    "logistic max min mul neg pow round rsqrt select_n sign sin sqrt square sub tan tanh"
)
_MOVED = "broadcast_in_dim expand_dims reshape squeeze"
_FUSED = frozenset(f"{_ELEMENTWISE} {_MOVED}".split())


@jax.custom_jvp
def once(x: jax.Array) -> jax.Array:
    """`x`, in a form that XLA's CPU does not compute again for each of its uses."""
    return lax.platform_dependent(x, cpu=lambda x: lax.max(x, lax.min(x, lax.full_like(x, 0))), default=lambda x: x)


@once.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return once(*primals), tangents[0]


def shared(tape: Tape) -> set[Value]:
    """The values with several uses that XLA would compute again from several arrays."""
    uses = Counter(v for step in tape.steps for v in step.inputs) + Counter(tape.outputs)
    found: set[Value] = set()
    reads: dict[Value, frozenset[Value]] = {}  # what is read to compute a value again
    for step in tape.steps:
        if not _is_fused(step):
            continue
        (out,) = step.outputs
        whole = [reads.get(v, frozenset([v])) for v in step.inputs if math.prod(v.shape) == math.prod(out.shape)]
        whole = [read for read in whole if read]  # without what is only spread out, like a bias
        read = frozenset[Value]().union(*whole)
        if uses[out] > 1:
            large = math.prod(out.shape) >= SMALLEST and jnp.issubdtype(out.dtype, jnp.floating)
            if large and len(whole) == 1 and len(read) > 1:
                found.add(out)
            if out in found or len(whole) > 1:
                continue  # it is stored, and read by itself
        reads[out] = read
    return found


def _is_fused(step: Step) -> bool:
    if step.primitive is None or len(step.outputs) != 1:
        return False
    if step.primitive.name == "custom_jvp_call":  # relu and its like
        return all(_is_fused(inner) or inner.primitive is None for inner in step.extra[0].steps)
    return step.primitive.name in _FUSED
