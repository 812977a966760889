"""Flax NNX wrappers: an NNX module as a pure function, its intermediate values by path, and transforms as modules."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxcompress import features, quantize
from jaxcompress.paths import Rules

_PATH = "jaxcompress_path"  # static, so it is part of what NNX's transforms compare and take along


def functional(module: nnx.Module) -> tuple[Callable[..., tuple[Any, Any]], Any, Any]:
    """An NNX module as a pure function of plain trees, which every transform of this library takes.

        apply, params, rest = functional(model)
        small = quantize.convert(params, rules)
        out, rest = compressed(apply)(small, rest, x)

    Returns:
      `apply(params, rest, *args, **kwargs) -> (out, rest)`; the parameters, as nested dicts of arrays; and all other
      state (batch statistics, random streams), as nested dicts too. `apply` leaves `module` as it is.
    """
    _, params, rest = _split(module)
    return _pure(module, lambda model: None), nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def capture(module: nnx.Module, patterns: str | Sequence[str]) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """The function that `functional(module)` gives, returning also what the submodules whose paths match return.

        _, params, rest = nnx.functional(model)
        (logits, rest), found = nnx.capture(model, ["blocks/[13]$"])(params, rest, x)

    Names are the modules' paths: `blocks/1/conv` for the result of `__call__`, `blocks/1/encode` for another public
    method's, `__call__` for the model's own, with the keys of a tuple or dict behind; a module found in two places has
    the first one's. Values named with `jax.ad_checkpoint.checkpoint_name` are there too. It works through `nnx.jit`,
    `nnx.remat` and `nnx.scan` (a leading axis of steps).

    Args:
      module: any NNX module; it stays as it is.
      patterns: regular expressions, as in `features.capture`, which says what is returned and raised.

    Returns:
      `captured(params, rest, *args, **kwargs) -> ((out, rest), features)`.
    """
    return features.capture(_pure(module, _name_results), patterns)


def _pure(module: nnx.Module, prepare: Callable[[Any], None]) -> Callable[..., tuple[Any, Any]]:
    graph, params, rest = _split(module)

    def apply(pure_params: Any, pure_rest: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        model = nnx.merge(graph, _filled(params, pure_params), _filled(rest, pure_rest))
        prepare(model)
        out = model(*args, **kwargs)
        return out, nnx.to_pure_dict(_split(model)[2])

    return apply


def _name_results(model: nnx.Module) -> None:
    """Has every module in `model`, a copy that nobody else sees, name what its methods return."""
    for path, module in list(nnx.iter_modules(model)):
        setattr(module, _PATH, "/".join(map(str, path)))
        module.__class__ = _naming(type(module))


@functools.cache
def _naming(cls: type) -> type:
    """A subclass whose methods name their results; being a class of its own, nothing traced for `cls` serves it."""
    methods: dict[str, Any] = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(nnx.Module)]):
        for name, method in vars(base).items():
            if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_")):
                methods[name] = _named(name, method)
    return type(cls.__name__, (cls,), methods)


def _named(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = getattr(self, _PATH)
        called = () if name == "__call__" and path else (name,)
        path = "/".join(part for part in (path, *called) if part)
        out = method(self, *args, **kwargs)
        return features.named(out, path, is_leaf=lambda x: isinstance(x, nnx.Pytree | nnx.Variable))

    return call


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
