"""Flax NNX wrappers: an NNX module as a pure function, its intermediate values by path, and transforms as modules."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcompress import features, quantize
from jaxcompress.paths import Rules
from jaxcompress.prune import channels
from jaxcompress.prune.channels._exported import difference, with_state_freed
from jaxcompress.quantize._ranges import hashable_ranges

__all__ = ["FakeQuantized", "Pruned", "capture", "functional", "pruned"]

_PATH = "jaxcompress_path"  # static, so it is part of what NNX's transforms compare and take along


def functional(module: nnx.Module) -> tuple[Callable[..., tuple[Any, Any]], Any, Any]:
    """An NNX module as a pure function of plain trees, which every transform of this library takes.

        apply, params, rest = functional(model)
        small = quantize.convert(params, rules)
        out, rest = compressed(apply)(small, rest, x)

    Returns:
      `apply(params, rest, *args, **kwargs) -> (out, rest)`; the parameters, as nested dicts of arrays; and all other
      state (batch statistics, random streams), as nested dicts too. `apply` leaves `module` as it is. What a module
      sows is in neither, so that `rest` has one structure in all calls: `capture` gives intermediate values out.
    """
    parts = _split(_without_sown(module))
    return _pure(parts, lambda model: None), nnx.to_pure_dict(parts[1]), nnx.to_pure_dict(parts[2])


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
    return features.capture(_pure(_split(_without_sown(module)), _name_results), patterns)


def _pure(parts: tuple[Any, Any, Any], prepare: Callable[[Any], None]) -> Callable[..., tuple[Any, Any]]:
    graph, params, rest = parts

    def apply(pure_params: Any, pure_rest: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        model = nnx.merge(graph, _filled(params, pure_params), _filled(rest, pure_rest))
        prepare(model)
        out = nnx.capture(model)(*args, **kwargs)  # of no type: what is sown meanwhile is not kept
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


def _without_sown(module: nnx.Module) -> Any:
    """A copy, of the same arrays, without what earlier calls have sown."""
    if not isinstance(module, nnx.Pytree):
        raise TypeError(
            f"want an NNX module, got {type(module).__name__}: of a Linen module `apply` is a pure function already, "
            "and linen.capture gives out what is inside"
        )
    model = nnx.merge(*nnx.split(module))
    nnx.pop(model, nnx.Intermediate)
    return model


def _filled(state: Any, pure: Any) -> Any:
    filled = jax.tree.map(lambda x: x, state)  # a copy: `state` belongs to the module that was taken apart
    nnx.replace_by_pure_dict(filled, pure)
    return filled


class FakeQuantized(nnx.Module):
    """An NNX module that computes as `inner` does, under fake quantization. `inner` keeps its parameters as floats.

        model = nnx.FakeQuantized(Net(rngs=rngs), rules=[("kernel$", quantize.Affine(bits=8, activation_bits=8))])

    Args:
      inner: the module.
      rules: as in `jaxcompress.quantize.fake`, on `inner`'s paths.
      ranges: of the inputs, as in `fake`: what `quantize.input_ranges` gives for `functional(inner)`.
      fold: whether kernels are rounded as the norms behind them will be folded into them, as in `fake`.
    """

    def __init__(
        self,
        inner: nnx.Module,
        rules: Rules[quantize.Scheme | None],
        ranges: Mapping[str, quantize.Range] | None = None,
        *,
        fold: bool = False,
    ):
        """All as in `quantize.fake`; `ranges` come from `input_ranges` of `functional(inner)`."""
        self.inner = inner
        self.fold = fold
        self.ranges: Any = nnx.static(hashable_ranges(ranges))
        pairs: Any = rules.items() if isinstance(rules, Mapping) else rules
        self.rules: Any = nnx.static(tuple(pairs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`inner(*args, **kwargs)`, with the chosen weights and their inputs rounded."""
        graph, params, rest = _split(self.inner)
        values, structure = jax.tree.flatten(rest)  # variables belong to the trace that makes them
        made: list[Any] = []

        def apply(pure: Any, values: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            model = nnx.merge(graph, _filled(params, pure), jax.tree.unflatten(structure, values))
            out = model(*args, **kwargs)
            new, after = jax.tree.flatten(_split(model)[2])  # not a plain dict: what is sown is new, and has a type
            made[:] = [after]
            return out, new

        ranges = None if self.ranges is None else dict(self.ranges)
        run = quantize.fake(apply, self.rules, ranges, fold=self.fold)
        out, new = run(nnx.to_pure_dict(params), values, *args, **kwargs)
        nnx.update(self.inner, jax.tree.unflatten(made[0], new))
        return out


class Pruned(nnx.Module):
    """An NNX module whose arrays are those that a plan of `prune.channels` leaves.

    It runs `inner` through `channels.shrink`, so nothing in `inner` need know its sizes: reshapes in its code, grouped
    convolutions, recurrent cells. `inner` itself holds the smaller arrays, under the paths that it had, and its new
    state (batch statistics, random streams). It can be trained, and traced and cut again. Call it under `nnx.jit`:
    each trace stages `inner` anew.

        graph, state = nnx.split(model)
        groups = channels.groups(lambda state, x: nnx.merge(graph, state)(x), state, x)
        small = jaxcompress.nnx.Pruned(model, channels.plan(groups, ...))

    Args:
      module: the whole module, which stays as it is.
      plan: of its whole state, as above; new state may shrink whether or not the plan's `free_out` says so.
      rederive: as for `channels.shrink`.
    """

    def __init__(self, module: nnx.Module, plan: channels.Plan, *, rederive: bool = False):
        self.inner = _cut(module, plan)
        self.plan: Any = nnx.static(plan)
        self.rederive = rederive

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`module(*args, **kwargs)`, at the sizes that are left."""
        graph, state = nnx.split(self.inner)
        plan = with_state_freed(self.plan)
        small = channels.shrink(_with_state(graph), plan.undone(state), plan, rederive=self.rederive)
        out, new, _ = small(state, args, kwargs)
        before = dict(nnx.to_flat_state(state))
        changed = [(path, value) for path, value in nnx.to_flat_state(new) if not _same(value, before[path])]
        if changed:  # only these, for under a transformation others may not be written to
            nnx.update(self.inner, nnx.from_flat_state(changed))
        return out


def pruned(
    module: nnx.Module, plan: channels.Plan, *args: Any, rederive: bool = False, tolerance: float = 1e-4, **kwargs: Any
) -> nnx.Module:
    """A module of the same class with the arrays that the plan leaves, and no trace of the whole one.

    The sizes that Flax's own layers keep beside their arrays are set: features of linear, convolutional, normalising,
    attention and recurrent layers, groups, heads. Queries of `nnx.MultiHeadAttention` are scaled where heads became
    narrower, for it divides by the root of their width. The result is compared with `channels.shrink` on the given
    inputs. `Pruned` takes any module.

    Args:
      module: the whole module, which stays as it is.
      plan: as for `Pruned`.
      *args: inputs with values like those of use.
      rederive: compare with the smaller model whose means are divided by the widths that are left. Layers like
        `nnx.LayerNorm` always divide so.
      tolerance: the largest difference, relative to the largest value.
      **kwargs: for the module.

    Raises:
      ValueError: the smaller module does not run, or computes something else; it names the layer.
    """
    graph, state = nnx.split(module)
    small = _cut(module, plan)
    for path, layer in list(nnx.iter_modules(small)):
        _resize(layer, "/".join(map(str, path)), plan)
    plan = with_state_freed(plan)
    expected, _, _ = jax.jit(channels.shrink(_with_state(graph), state, plan, rederive=rederive))(
        plan.apply(state), args, kwargs
    )
    small_graph, small_state = nnx.split(small)
    try:
        got, _, _ = jax.jit(_with_state(small_graph, _name_failures))(small_state, args, kwargs)
    except Exception as error:
        failed = error if isinstance(error, _LayerError) else _LayerError("", small)
        cause = error.__cause__ if error is failed else error
        raise ValueError(
            f"{_described(failed.path, failed.layer)} does not run on the arrays that the plan leaves ({cause}): it "
            "has sizes of its own. Take jaxcompress.nnx.Pruned(module, plan), which runs any module"
        ) from cause
    apart = difference(expected, got)
    if not apart <= tolerance:
        ways = "jaxcompress.nnx.Pruned(module, plan)"
        derives = [
            _described("/".join(map(str, path)), layer)
            for path, layer in nnx.iter_modules(small)
            if type(layer) not in _READ_FROM_ARRAYS and _lost("/".join(map(str, path)), plan)
        ]
        raise ValueError(
            f"the smaller {type(module).__name__} differs by {apart:.2g} (of the largest value) from what "
            f"channels.shrink gives{' with rederive=True' if rederive else ''}: layers compute with their widths, of "
            f"{', '.join(derives)}. Take {ways if rederive else 'rederive=True, or ' + ways}"
        )
    return small


def _same(a: Any, b: Any) -> bool:
    """Whether two variables hold the same arrays, not only equal ones."""
    return all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _cut(module: nnx.Module, plan: channels.Plan) -> Any:
    graph, state = nnx.split(module)
    return nnx.merge(graph, plan.apply(state))


def _with_state(graph: Any, prepare: Callable[[Any], None] = lambda model: None) -> Callable[..., Any]:
    """`(state, args, kwargs) -> (out, new state, a scalar)`."""

    def run(state: Any, args: Any, kwargs: Any) -> Any:
        model = nnx.merge(graph, state)
        prepare(model)
        out = model(*args, **kwargs)
        return out, nnx.state(model), jnp.zeros(())

    return run


def _resize(layer: Any, path: str, plan: channels.Plan) -> None:
    """Sets the sizes that a layer of Flax keeps beside its arrays; those of others stay.

    They are the last axes: layers that `nnx.vmap` stacked, for `nnx.scan`, have more in front.
    """
    if isinstance(layer, nnx.Linear):
        layer.in_features, layer.out_features = layer.kernel.shape[-2:]
    elif isinstance(layer, nnx.LoRA):
        layer.in_features, layer.out_features = layer.lora_a.shape[-2], layer.lora_b.shape[-1]
    elif isinstance(layer, nnx.LinearGeneral):
        batch, inputs = len(layer.batch_axis), len(layer.in_features)
        shape = layer.kernel.shape[-(batch + inputs + len(layer.out_features)) :]
        layer.batch_axis = type(layer.batch_axis)(zip(layer.batch_axis, shape[:batch], strict=True))
        layer.in_features, layer.out_features = shape[batch : batch + inputs], shape[batch + inputs :]
    elif isinstance(layer, nnx.Einsum):
        layer.kernel_shape, layer.bias_shape = layer.kernel.shape, getattr(layer.bias, "shape", None)
    elif isinstance(layer, nnx.Conv):
        groups = layer.feature_group_count
        if groups > 1:
            layer.feature_group_count = _left(path, "kernel", -1, groups, plan)
        layer.in_features = layer.kernel.shape[-2] * layer.feature_group_count
        layer.out_features, layer.kernel_shape = layer.kernel.shape[-1], layer.kernel.shape
    elif isinstance(layer, nnx.ConvTranspose):
        sizes = layer.kernel.shape[-2:]
        layer.in_features, layer.out_features = sizes[::-1] if layer.transpose_kernel else sizes
        layer.kernel_shape = layer.kernel.shape
    elif isinstance(layer, nnx.Embed):
        layer.num_embeddings, layer.features = layer.embedding.shape[-2:]
    elif isinstance(layer, nnx.GroupNorm):
        of = next((name for name in ("scale", "bias") if getattr(layer, name) is not None), None)
        if of is not None:
            layer.num_groups = _left(path, of, -1, layer.num_groups, plan)
            layer.group_size = getattr(layer, of).shape[-1] // layer.num_groups
    elif isinstance(layer, nnx.BatchNorm | nnx.LayerNorm | nnx.RMSNorm | nnx.InstanceNorm):
        arrays = [getattr(layer, name, None) for name in ("mean", "scale", "bias")]
        layer.num_features = next((math.prod(x.shape) for x in arrays if x is not None), layer.num_features)
    elif isinstance(layer, nnx.MultiHeadAttention):
        _resize_attention(layer, path, plan)
    elif isinstance(layer, nnx.LSTMCell):
        layer.in_features, layer.hidden_features = layer.ii.kernel.shape[-2], layer.hi.kernel.shape[-2]
    elif isinstance(layer, nnx.OptimizedLSTMCell | nnx.GRUCell | nnx.SimpleCell):
        layer.in_features, layer.hidden_features = layer.dense_i.kernel.shape[-2], layer.dense_h.kernel.shape[-2]


def _resize_attention(layer: Any, path: str, plan: channels.Plan) -> None:
    layer.in_features, layer.num_heads, layer.head_dim = layer.query.kernel.shape[-3:]
    layer.in_kv_features, layer.num_kv_heads = layer.key.kernel.shape[-3:-1]
    layer.qkv_features, layer.out_features = layer.num_heads * layer.head_dim, layer.out.kernel.shape[-1]
    whole = plan.shapes[_joined(path, "query/kernel")][-1]
    if layer.head_dim != whole and not layer.normalize_qk:
        for x in (layer.query.kernel, layer.query.bias):
            if x is not None:
                x[...] = x[...] * jnp.asarray((layer.head_dim / whole) ** 0.5, x.dtype)


def _left(path: str, name: str, axis: int, groups: int, plan: channels.Plan) -> int:
    """How many of the groups that an axis falls into are left."""
    full = _joined(path, name)
    shape = plan.shapes[full]
    axis %= len(shape)
    kept = plan.keep.get(full, {}).get(axis, np.arange(shape[axis]))
    return len(np.unique(kept // (shape[axis] // groups)))


def _lost(path: str, plan: channels.Plan) -> bool:
    return any(name.rsplit("/", 1)[0] == path for name in plan.keep)


def _joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _described(path: str, layer: Any) -> str:
    """A layer in words, with its integers."""
    sizes = ", ".join(
        f"{key}={value}"
        for key, value in vars(layer).items()
        if not key.startswith("_") and isinstance(value, int | tuple) and not isinstance(value, bool)
    )
    return f"{f'the layer {path!r}' if path else 'the model itself'} ({type(layer).__name__}({sizes}))"


class _LayerError(Exception):
    """What a layer raised is its cause."""

    def __init__(self, path: str, layer: Any):
        super().__init__(path)
        self.path, self.layer = path, layer


def _name_failures(model: Any) -> None:
    """Has the innermost module in `model` that fails say so, by a `_LayerError`."""
    for path, module in list(nnx.iter_modules(model)):
        module.__class__ = _failing(type(module), "/".join(map(str, path)))


def _failing(cls: type, path: str) -> type:
    own = next((vars(c)["__call__"] for c in cls.__mro__ if "__call__" in vars(c)), None)
    if own is None:
        return cls

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return own(self, *args, **kwargs)
        except _LayerError:
            raise
        except Exception as error:
            self.__class__ = cls
            raise _LayerError(path, self) from error

    return type(cls.__name__, (cls,), {"__call__": call})


_READ_FROM_ARRAYS = {
    nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, nnx.Embed, nnx.BatchNorm, nnx.InstanceNorm,
}  # fmt: skip
