"""Flax NNX wrappers: an NNX module as a pure function, and the library's function transforms as modules."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxcompress import quantize
from jaxcompress.paths import Rules


def functional(module: nnx.Module) -> tuple[Callable[..., tuple[Any, Any]], Any, Any]:
    """An NNX module as a pure function of plain trees, which every transform of this library takes.

        apply, params, rest = functional(model)
        small = quantize.convert(params, rules)
        out, rest = compressed(apply)(small, rest, x)

    Returns:
      `apply(params, rest, *args, **kwargs) -> (out, rest)`; the parameters, as nested dicts of arrays; and all other
      state (batch statistics, random streams), as nested dicts too. `apply` leaves `module` as it is.
    """
    graph, params, rest = _split(module)

    def apply(pure_params: Any, pure_rest: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        model = nnx.merge(graph, _filled(params, pure_params), _filled(rest, pure_rest))
        out = model(*args, **kwargs)
        return out, nnx.to_pure_dict(_split(model)[2])

    return apply, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def _split(module: nnx.Module) -> tuple[Any, Any, Any]:
    parts: Any = nnx.split(module, nnx.Param, ...)  # graph, parameters, all other state
    return parts


def _filled(state: Any, pure: Any) -> Any:
    filled = jax.tree.map(lambda x: x, state)  # a copy: `state` belongs to the module that was taken apart
    nnx.replace_by_pure_dict(filled, pure)
    return filled


class FakeQuantized(nnx.Module):
    """An NNX module that computes as `inner` does, under fake quantization. `inner` keeps its parameters as floats.

    model = nnx.FakeQuantized(Net(rngs=rngs), rules=[("kernel$", quantize.Affine(bits=8, activation_bits=8))])
    """

    def __init__(self, inner: nnx.Module, rules: Rules[quantize.Affine | None]):
        self.inner = inner
        pairs: Any = rules.items() if isinstance(rules, Mapping) else rules
        self.rules: Any = nnx.static(tuple(pairs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`inner(*args, **kwargs)`, with the chosen weights and their inputs rounded."""
        apply, params, rest = functional(self.inner)
        out, rest = quantize.fake(apply, self.rules)(params, rest, *args, **kwargs)
        state = _split(self.inner)[2]
        nnx.replace_by_pure_dict(state, rest)
        nnx.update(self.inner, state)
        return out
