"""From a function and its arguments to a labelled tape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np

from jaxcompress import paths
from jaxcompress.arrays import Leaf

# The rules register themselves.
from jaxcompress.prune.channels import (  # noqa: F401
    _rules_control,
    _rules_elementwise,
    _rules_index,
    _rules_product,
    _rules_reduce,
    _rules_shape,
    _rules_shard_map,
)
from jaxcompress.prune.channels._convolve import as_written
from jaxcompress.prune.channels._tape import Tape, Tracer, Value, live

OUTPUT = "an output of the function (free_out names outputs that may shrink)"
KEYS = "random keys"


@dataclass(eq=False)
class Traced:
    """A function, staged and labelled.

    Attributes:
      tracer: the labels.
      tape: the whole function, from the parameters' and the arguments' leaves to the outputs'.
      names: of the parameters' leaves.
      params: their values, with the labels before anything was known.
      out: makes the function's result from the tape's outputs.
      out_names: of the outputs' leaves.
    """

    tracer: Tracer
    tape: Tape
    names: list[str]
    params: list[Value]
    out: Callable[[Sequence[Any]], Any]
    out_names: list[str]


def is_array(x: Any) -> bool:
    """Whether a leaf is traced; everything else (flags, strings, functions) stays as it is."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def trace(fn: Callable[..., Any], params: Any, args: Sequence[Any], free_out: Sequence[str] = ()) -> Traced:
    """Stage `fn(params, *args)` and label every axis in it.

    Raises:
      ValueError: `params` has no arrays, or compressed leaves, or sizes are symbolic.
      UnmatchedRuleError: a pattern of `free_out` matches no output.
    """
    compressed = [name for name, x in paths.named_leaves(params, lambda x: isinstance(x, Leaf)) if isinstance(x, Leaf)]
    if compressed:
        raise ValueError(f"{compressed[0]!r} is compressed: cut the units first, and compress what is left")
    param_arrays, param_rest = eqx.partition(params, is_array)
    arg_arrays, arg_rest = eqx.partition(tuple(args), is_array)
    names = [name for name, _ in paths.named_leaves(param_arrays)]
    if not names:
        raise ValueError("params has no arrays: pass the tree that is to be cut, as the function's first argument")
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"two parameters are called {twice[0]!r}: give their branches of the tree other names")
    static: list[Any] = []

    def staged(param_arrays: Any, arg_arrays: Any) -> Any:
        args = eqx.combine(arg_arrays, arg_rest)
        out_arrays, out_rest = eqx.partition(fn(eqx.combine(param_arrays, param_rest), *args), is_array)
        static.append(out_rest)
        return out_arrays

    structs = jax.tree.map(_struct, (param_arrays, arg_arrays))
    try:
        with as_written():
            jaxpr, out_shapes = jax.make_jaxpr(staged, return_shape=True)(*structs)
    except Exception as error:
        if any(map(_explicit, jax.tree.leaves((param_arrays, arg_arrays)))):
            error.add_note(
                "Channels are staged without shardings, and these arrays lie along Explicit axes of a mesh. Place them "
                "on a mesh of jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * n)"
            )
        raise
    tracer = Tracer()
    inputs = []
    for i, aval in enumerate(jaxpr.in_avals):
        value = tracer.value(aval)
        if i < len(names):
            value.labels = tuple(tracer.atoms.fresh(n) if n > 1 else None for n in value.shape)
            value.zero = (True,) * value.ndim
            value.source = (i, tuple((axis,) for axis in range(value.ndim)))
            if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
                tracer.freeze(value, range(value.ndim), KEYS)
        inputs.append(value)
    params_before = [Value(v.shape, v.dtype, v.labels, v.zero) for v in inputs[: len(names)]]
    tape = Tape(inputs)
    outs = tracer.walk(live(jaxpr), inputs, tape)
    out_names = [name for name, _ in paths.named_leaves(out_shapes)]
    free = paths.match([(pattern, True) for pattern in free_out], out_names, default=False)
    for value, is_free in zip(outs, free, strict=True):
        if not value.known and not is_free:
            tracer.freeze(value, range(value.ndim), OUTPUT)
    tape.outputs = outs
    structure = jax.tree.structure(out_shapes)
    return Traced(
        tracer,
        tape,
        names,
        params_before,
        lambda leaves: eqx.combine(jax.tree.unflatten(structure, leaves), static[0]),
        out_names,
    )


def _explicit(x: Any) -> bool:
    sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding
    return jax.sharding.AxisType.Explicit in getattr(getattr(sharding, "mesh", None), "axis_types", ())


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
