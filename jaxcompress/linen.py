"""Flax Linen wrappers: the library's function transforms as modules, and a module's intermediate values by path."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import subtract_filters

from jaxcompress import features, quantize
from jaxcompress.paths import Rules, named_leaves, with_leaves
from jaxcompress.prune import channels
from jaxcompress.prune.channels._exported import difference, with_state_freed
from jaxcompress.quantize._ranges import hashable_ranges

__all__ = ["FakeQuantized", "Pruned", "capture", "pruned"]


class FakeQuantized(nn.Module):
    """A Linen module that computes as `inner` does, under fake quantization.

    Its variables are `inner`'s, under the same paths: wrap and unwrap a model without touching its parameters. Batch
    statistics and dropout work as in `inner`. Inside a larger model, it quantizes its own part only: the modules in
    `inner`'s attributes must be its own, made outside of the larger model's methods, or there with `parent=None`.

        model = linen.FakeQuantized(ResNet(), rules=(("kernel$", quantize.Affine(bits=8, activation_bits=8)),))

    Attributes:
      inner: the module.
      rules: as in `jaxcompress.quantize.fake`, on `inner`'s paths; a tuple of pairs, for Linen hashes modules.
      ranges: of the inputs, as in `fake`: what `quantize.input_ranges` gives for `inner`.
      fold: whether kernels are rounded as the norms behind them will be folded into them, as in `fake`.
    """

    inner: nn.Module
    rules: Rules[quantize.Scheme | None]
    ranges: Any = None
    fold: bool = False

    def __post_init__(self) -> None:
        """Makes the ranges hashable, too."""
        self.ranges = hashable_ranges(self.ranges)
        super().__post_init__()

    def setup(self) -> None:
        """Puts `inner`'s variables in this module's own place."""
        assert self.scope is not None and self.inner.scope is not None
        _check_own(self.inner)
        if self.inner.scope.parent is self.scope:  # nothing will be there: a module within may have the name "inner"
            self.scope.reservations.pop(str(self.inner.name), None)
        nn.share_scope(self, self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`inner(*args, **kwargs)`, with the chosen weights and their inputs rounded."""
        if self.is_initializing():
            return self.inner(*args, **kwargs)
        assert self.scope is not None
        mutable = subtract_filters(self.scope.mutable, "params")  # also what is not there yet: what is sown, a cache
        rngs = {name: self.make_rng(name) for name in self.scope.rngs if name != "params"}
        ranges = None if self.ranges is None else dict(self.ranges)
        apply = quantize.fake(self.inner.clone(parent=None).apply, self.rules, ranges, fold=self.fold)
        out, updates = apply(dict(self.variables), *args, **kwargs, rngs=rngs, mutable=mutable)
        for collection, variables in updates.items():
            for name, value in variables.items():
                self.put_variable(collection, name, value)
        return out


def _check_own(inner: nn.Module) -> None:
    """An error where a module in `inner`'s attributes has its variables elsewhere: they would not be found."""
    within, left = [inner], [inner]
    while left:
        module = left.pop()
        fields = [getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
        held = [x for x in jax.tree.leaves(fields, is_leaf=_is_module) if _is_module(x)]
        for x in held:
            if _is_module(x.parent) and not any(x.parent is each for each in within):
                one, here, there = (type(each).__name__ for each in (x, inner, x.parent))
                raise ValueError(
                    f"FakeQuantized cannot round {one} {x.name!r} in {here}: it belongs to {there}, which has its "
                    f"variables. Make it in a method of {here}, or with parent=None; or wrap {there}"
                )
        within += held
        left += held


def _is_module(x: Any) -> bool:
    return isinstance(x, nn.Module)


class Pruned(nn.Module):
    """A Linen module whose variables are those that a plan of `prune.channels` leaves of `inner`'s.

    It runs `inner` through `channels.shrink`, so nothing in `inner` need know its sizes: `@nn.compact` modules with
    sizes in their code, reshapes, recurrent cells. Paths are `inner`'s. Batch statistics, dropout, `mutable` and
    keyword arguments work as in `inner`; `init` draws `inner`'s variables and cuts them; it can be trained, exported,
    traced and cut again. Call it under `jit`: each trace stages `inner` anew.

        small = linen.Pruned(model, plan)
        logits = jax.jit(small.apply)(plan.apply(variables), images)

    Attributes:
      inner: the whole module.
      plan: from groups of `inner.apply`, with all collections in the tree that was cut; new batch statistics and what
        else goes into mutable collections may shrink whether or not the plan's `free_out` says so.
      rederive: as for `channels.shrink`.
    """

    inner: nn.Module
    plan: channels.Plan
    rederive: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`inner(*args, **kwargs)`, at the sizes that are left."""
        assert self.scope is not None
        module = self.inner.clone(parent=None)
        if self.is_initializing():
            keys = {name: self.make_rng(name) for name in self.scope.rngs}
            self._put(self.plan.apply(module.init(keys, *args, **kwargs)))
        mutable = subtract_filters(self.scope.mutable, "params")  # also what is not there yet: what is sown, a cache
        rngs = {name: self.make_rng(name) for name in self.scope.rngs if name != "params"}

        def apply(variables: Any, args: Any, kwargs: Any, rngs: Any) -> Any:
            out, updates = module.apply(variables, *args, **kwargs, rngs=rngs, mutable=mutable)
            return out, updates, jnp.zeros(())

        variables = dict(self.variables)
        small = channels.shrink(apply, self.plan.undone(variables), with_state_freed(self.plan), rederive=self.rederive)
        out, updates, _ = small(variables, args, kwargs, rngs)
        self._put(updates)
        return out

    def _put(self, collections: Mapping[str, Any]) -> None:
        for collection, variables in collections.items():
            for name, value in variables.items():
                self.put_variable(collection, name, value)


def pruned(
    module: nn.Module,
    variables: Any,
    plan: channels.Plan,
    *args: Any,
    rederive: bool = False,
    tolerance: float = 1e-4,
    rngs: Any = None,
    **kwargs: Any,
) -> tuple[nn.Module, Any]:
    """An ordinary module of the sizes that are left, and its variables, where the module's attributes decide the sizes.

    Integer attributes (`features=64`, `widths=(16, 32)`, also of modules in attributes, as in `nn.Sequential`) are set
    to the widths that the plan leaves, so that `init` has the smaller variables' shapes. Queries of
    `nn.MultiHeadDotProductAttention` are scaled where heads became narrower, for it divides by the root of their width.
    The result is compared with `channels.shrink` on the given inputs. `Pruned` takes any module.

    Args:
      module: the whole module.
      variables: all its collections, whole.
      plan: as for `Pruned`.
      *args: inputs, as for `module.apply`; values like those of use.
      rederive: compare with the smaller model whose means are divided by the widths that are left. Layers like
        `nn.LayerNorm` always divide so.
      tolerance: the largest difference, relative to the largest value.
      rngs: for `module.apply`.
      **kwargs: for `module.apply`: in evaluation, for nothing is mutable here.

    Raises:
      ValueError: no attributes give these sizes, or the smaller module computes something else; it names the layer.
    """
    small = plan.apply(variables)
    wanted = {name: tuple(x.shape) for name, x in named_leaves(small)}
    keys = {**(rngs or {}), "params": jax.random.key(0)}

    def init(made: nn.Module) -> Any:
        return jax.eval_shape(lambda *a: made.init(keys, *a, **kwargs), *args)

    changed, wrong = _resized(module, plan, wanted, init)
    layers = _layers(module, init)
    if wrong:
        path, got = wrong
        raise ValueError(
            f"no attributes of {type(module).__name__} give the sizes that the plan leaves: {_layer(layers, path)} "
            f"makes {path!r} of shape {got}, the plan leaves {wanted[path]}. Take linen.Pruned(module, plan), "
            "which runs any module"
        )
    scaled = _with_scaled_queries(layers, small, plan)

    def run(made: nn.Module) -> Callable[..., Any]:
        return lambda v, args: (made.apply(v, *args, rngs=rngs, **kwargs), {}, jnp.zeros(()))

    expected = jax.jit(channels.shrink(run(module), variables, with_state_freed(plan), rederive=rederive))(small, args)
    apart = difference(expected, jax.jit(run(changed))(scaled, args))
    if not apart <= tolerance:
        ways = "linen.Pruned(module, plan)" if rederive else "rederive=True, or linen.Pruned(module, plan)"
        raise ValueError(
            f"the smaller {type(module).__name__} differs by {apart:.2g} (of the largest value) from what "
            f"channels.shrink gives{' with rederive=True' if rederive else ''}, for layers compute with their widths: "
            f"{_deriving(layers, plan)}. Take {ways}"
        )
    return changed, scaled


_PLAIN = {"Dense", "Conv", "BatchNorm", "Embed", "DenseGeneral", "ConvTranspose", "Einsum"}
_MOST_TRIES = 64


def _resized(
    module: nn.Module, plan: channels.Plan, wanted: Mapping[str, tuple[int, ...]], init: Callable[[nn.Module], Any]
) -> tuple[nn.Module, tuple[str, tuple[int, ...] | None] | None]:
    """The module with other integers in its attributes, and the first array that still has another shape, if any."""
    pairs = {(n, len(k)) for path, axes in plan.keep.items() for a, k in axes.items() for n in [plan.shapes[path][a]]}
    pairs |= {pair for pair in plan.widths.values() if pair[0] != pair[1]}
    pairs |= {(a * c, b * d) for a, b in plan.widths.values() for c, d in plan.widths.values() if (a, c) != (b, d)}
    slots = list(_integers(module))
    choices = [[*sorted({new for old, new in pairs if old == value}), value] for _, value in slots]
    best: tuple[int, nn.Module, Any] = len(wanted) + 1, module, None
    for tried in (*itertools.islice(itertools.product(*choices), _MOST_TRIES), [value for _, value in slots]):
        values = {at: new for (at, _), new in zip(slots, tried, strict=True)}
        changed = _with_integers(module, values)
        try:
            made = init(changed)
        except (
            TypeError,
            ValueError,
            AssertionError,
            ZeroDivisionError,
            flax.errors.FlaxError,
        ):  # sizes that don't go together
            continue
        shapes = {name: tuple(x.shape) for name, x in named_leaves(made)}
        wrong = [(name, shapes.get(name)) for name, shape in wanted.items() if shapes.get(name) != shape]
        if not wrong:
            return changed, None
        if len(wrong) < best[0]:
            best = len(wrong), changed, wrong[0]
    return best[1], best[2]


def _integers(x: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], int]]:
    """The integers in a module's attributes, with where they stand."""
    if isinstance(x, nn.Module):
        for field in dataclasses.fields(x):
            if field.init and field.name not in ("parent", "name"):
                yield from _integers(getattr(x, field.name), (*at, field.name))
    elif isinstance(x, tuple | list):
        for i, each in enumerate(x):
            yield from _integers(each, (*at, i))
    elif isinstance(x, int) and not isinstance(x, bool):
        yield at, x


def _with_integers(x: Any, values: Mapping[tuple[Any, ...], int], at: tuple[Any, ...] = ()) -> Any:
    if isinstance(x, nn.Module):
        names = {path[len(at)] for path in values if path[: len(at)] == at and len(path) > len(at)}
        return x.clone(parent=None, **{n: _with_integers(getattr(x, n), values, (*at, n)) for n in names})
    if isinstance(x, tuple | list):
        return type(x)([_with_integers(each, values, (*at, i)) for i, each in enumerate(x)])
    return values.get(at, x)


Layers = dict[tuple[str, ...], tuple[str, dict[str, int]]]


def _layers(module: nn.Module, init: Callable[[nn.Module], Any]) -> Layers:
    """The path of every submodule that is called, with its class and its integers."""
    found: Layers = {}

    def note(method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.module.path not in found:
            integers = {".".join(map(str, at)): n for at, n in _integers(context.module)}
            found[context.module.path] = type(context.module).__name__, integers
        return method(*args, **kwargs)

    with nn.intercept_methods(note):
        init(module)
    return found


def _owner(layers: Layers, path: str) -> tuple[str, ...]:
    """The innermost layer that an array belongs to, in whichever collection."""
    within = f"/{path}"
    return max((at for at in layers if "".join(f"/{part}" for part in at) + "/" in within), key=len)


def _layer(layers: Layers, path: str) -> str:
    """That layer in words."""
    owner = _owner(layers, path)
    name, integers = layers[owner]
    sizes = ", ".join(f"{key}={n}" for key, n in integers.items())
    return f"the layer {'/'.join(owner)!r} ({name}({sizes}))"


def _deriving(layers: Layers, plan: channels.Plan) -> str:
    """The layers that lost channels and may compute with their widths, in words."""
    owners = dict.fromkeys(_owner(layers, path) for path in plan.keep)
    found = [f"{'/'.join(at)!r} ({layers[at][0]})" for at in owners if at and layers[at][0] not in _PLAIN]
    return ", ".join(found) or "the module itself"


def _with_scaled_queries(layers: Layers, small: Any, plan: channels.Plan) -> Any:
    """Attention divides by the root of a head's width, which the plan may have changed."""
    factors: dict[str, float] = {}
    for path, (name, _) in layers.items():
        kernel = "/".join((*path, "query", "kernel"))
        kept = plan.keep.get(kernel, {}).get(2)
        if name in ("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention") and kept is not None:
            factor = (len(kept) / plan.shapes[kernel][2]) ** 0.5
            factors |= {kernel: factor, "/".join((*path, "query", "bias")): factor}
    leaves = [x * jnp.asarray(factors[name], x.dtype) if name in factors else x for name, x in named_leaves(small)]
    return with_leaves(small, leaves)


def capture(module: nn.Module, patterns: str | Sequence[str]) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """`module.apply`, returning also what the submodules whose paths match return.

        captured = linen.capture(ResNet(), ["Block_[13]$", "^Dense_0$"])
        (logits, updates), found = captured(variables, x, training=True, mutable=["batch_stats"])

    Names are module paths, the parameters' own: `Block_1/Conv_0` for the result of `__call__`, `Block_1/encode` for
    another method's, `__call__` for the model's own, with the keys of a tuple or dict behind. Values named with
    `jax.ad_checkpoint.checkpoint_name` are there too. Nothing in the model need say so, also under `nn.remat` and
    `nn.scan` (a leading axis of steps); only what runs under an `nn.jit` that was traced before stays unseen.

    Args:
      module: any Linen module.
      patterns: regular expressions, as in `features.capture`, which says what is returned and raised.

    Returns:
      `captured(variables, *args, **kwargs) -> (module.apply(variables, *args, **kwargs), features)`.
    """

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(_name_results):
            return module.apply(variables, *args, **kwargs)

    return features.capture(apply, patterns)


def _name_results(method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    out = method(*args, **kwargs)
    if context.method_name == "setup":
        return out
    called = () if context.method_name == "__call__" and context.module.path else (context.method_name,)
    path = "/".join((*context.module.path, *called))
    return features.named(out, path, is_leaf=lambda x: isinstance(x, nn.Module))
