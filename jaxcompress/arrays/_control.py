"""What quax 0.4 lacks for models that use `jax.checkpoint`, `jax.custom_vjp` and `jax.custom_jvp` inside.

quax interprets a function by a private trace. Four of its answers are completed here, where compressed leaves meet
(`_loops.py` has those of control flow):

* `remat`: without a rule the weights would be made dense before the body is seen;
* `custom_vjp`: quax's trace has no answer and raises;
* `custom_jvp`: quax takes leaves apart, and integer children then have no tangents that it could put together again;
* `shard_map`: not seen through; the error says what to do.

Both derivatives are restated as custom derivatives of a function of the leaves themselves, whose body runs under the
same dispatch, so that rules apply inside. The trace is private: pyproject.toml pins quax 0.4, and the day quax answers
by itself this file can go, with the tests in tests/arrays/test_arrays_control.py as its judge.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax._src import core
from jax._src.pjit import reshard_p
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, primitives
from jaxtyping import ArrayLike
from quax._trace import _QuaxTrace

from jaxcompress.arrays._leaf import Leaf, is_leaf, register
from jaxcompress.arrays._products import fitting

_quax_custom_jvp = _QuaxTrace.process_custom_jvp_call


@register(reshard_p)
def _reshard(w: Leaf, *, dst_sharding: Any, **params: Any) -> Any:
    """A leaf on other axes, its children as they fit: onto automatic ones and back, as `.at[]` takes it."""

    def there(child: jax.Array) -> jax.Array:
        spec = [None] * child.ndim
        if child.ndim == w.ndim:  # not what is no part of the axis: a table, packed bytes
            own = zip(fitting(dst_sharding, child.shape), child.shape, w.shape, strict=True)
            spec = [entry if size == n else None for entry, size, n in own]
        sharding = dst_sharding.update(spec=jax.sharding.PartitionSpec(*spec))
        return reshard_p.bind(child, dst_sharding=sharding, **params)

    return jax.tree.map(there, w)


@quax.register(primitives.remat_p)
def _remat(*args: ArrayLike | quax.ArrayValue, jaxpr: Any, prevent_cse: Any, policy: Any, **_: Any) -> Any:
    """Runs the body, with its rules, under `jax.checkpoint`."""
    closed = jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, ())
    return jax.checkpoint(quax.quaxify(jaxpr_as_fun(closed)), prevent_cse=prevent_cse, policy=policy)(*args)


def _custom_vjp(
    self: Any,
    primitive: Any,
    fun: Any,
    fwd: Any,
    bwd: Any,
    tracers: Sequence[Any],
    *,
    out_trees: Any,
    symbolic_zeros: bool,
) -> Any:
    values = [_value(self, t) for t in tracers]
    with core.set_current_trace(self.parent_trace):
        if any(map(is_leaf, values)):
            return self.stage_value(_vjp_of_leaves(fun, fwd, bwd, out_trees)(values))
        params = {"subfuns": (fun, fwd, bwd), "out_trees": out_trees, "symbolic_zeros": symbolic_zeros}
        avals = tuple(jax.typeof(x) for x in values)
        return self.stage_value(primitive.bind_with_trace(self.parent_trace, tuple(values), avals, params))


def _shard_map(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "compressed(fn) does not see through a shard_map inside fn: "
        "call compressed inside the function that shard_map maps"
    )


def _vjp_of_leaves(fun: Any, fwd: Any, bwd: Any, out_trees: Any) -> Callable[[list[Any]], list[Any]]:
    """The model's custom_vjp as one over compressed values. `fun`, `fwd`, `bwd` are JAX's flat, wrapped functions."""

    @jax.custom_vjp
    def call(values: list[Any]) -> list[Any]:
        return _run(fun, values)

    def call_fwd(primals: list[Any]) -> Any:
        perturbed = [any(p.perturbed for p in jax.tree.leaves(x, is_leaf=_is_primal)) for x in primals]
        values = jax.tree.map(lambda p: p.value, primals, is_leaf=_is_primal)

        def flagged(*args: Any) -> Any:  # JAX's fwd takes (value, is perturbed) by turns
            return fwd.call_wrapped(*[x for pair in zip(args, perturbed, strict=True) for x in pair])

        outs = quax.quaxify(flagged)(*values)
        _, res_tree, forwarded = out_trees()
        own = iter(outs)
        residuals = [next(own) if i is None else values[i] for i in forwarded]
        assert len(residuals) == res_tree.num_leaves
        return [_plain(x) for x in own], (residuals, values)

    def call_bwd(saved: Any, cotangents: list[Any]) -> Any:
        residuals, values = saved
        found = quax.quaxify(bwd.call_wrapped)(*residuals, *map(_instantiate, cotangents))
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], list | tuple):
            found = found[0]  # JAX 0.12 returns (cotangents, logs)
        return ([_to_children(x, ct) for x, ct in zip(values, found, strict=True)],)

    call.defvjp(call_fwd, call_bwd, symbolic_zeros=True)
    return call


def _custom_jvp(self: Any, primitive: Any, fun: Any, jvp: Any, tracers: Sequence[Any], *, symbolic_zeros: bool) -> Any:
    values = [_value(self, t) for t in tracers]
    if not any(map(is_leaf, values)):
        return _quax_custom_jvp(self, primitive, fun, jvp, tracers, symbolic_zeros=symbolic_zeros)

    @jax.custom_jvp
    def call(values: list[Any]) -> list[Any]:
        return _run(fun, values)

    @call.defjvp
    def call_jvp(primals: Any, tangents: Any) -> Any:
        (values,), (moves,) = primals, tangents
        outs = _run(jvp, [*values, *map(_from_children, values, moves)])
        return outs[: len(outs) // 2], outs[len(outs) // 2 :]

    with core.set_current_trace(self.parent_trace):
        return self.stage_value(call(values))


def _run(wrapped: Any, values: Sequence[Any]) -> list[Any]:
    return [_plain(x) for x in quax.quaxify(wrapped.call_wrapped)(*values)]


def _value(trace: Any, tracer: Any) -> Any:
    value = trace.to_value(tracer)
    return value if is_leaf(value) else value.materialise()


def _plain(x: Any) -> Any:
    return x.materialise() if isinstance(x, quax.Value) else x


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _instantiate(ct: Any) -> Any:
    return jnp.zeros(ct.shape, ct.dtype) if isinstance(ct, SymbolicZero) else ct


def _to_children(value: Any, ct: Any) -> Any:
    """The cotangent of a value's children from the cotangent of its dense value; `None` is zero."""
    if not eqx.is_array(ct) or ct.dtype == jax.dtypes.float0:
        return None
    if not is_leaf(value):
        return ct
    trained, rest = eqx.partition(value, eqx.is_inexact_array)
    return jax.vjp(lambda children: eqx.combine(children, rest).materialise(), trained)[1](ct)[0]


def _from_children(value: Any, tangent: Any) -> Any:
    """The tangent of a value's dense value from the tangents of its children."""
    if not is_leaf(value):
        return tangent
    trained, rest = eqx.partition(value, eqx.is_inexact_array)
    moves = eqx.filter(tangent, eqx.is_inexact_array)
    return jax.jvp(lambda children: eqx.combine(children, rest).materialise(), (trained,), (moves,))[1]


for _name, _answer in {
    "process_custom_vjp_call": _custom_vjp,
    "process_custom_jvp_call": _custom_jvp,
    "process_shard_map": _shard_map,
}.items():
    setattr(_QuaxTrace, _name, _answer)
