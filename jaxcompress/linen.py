"""Flax Linen wrappers: the library's function transforms as modules, and a module's intermediate values by path."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxcompress import features, quantize
from jaxcompress.paths import Rules


class FakeQuantized(nn.Module):
    """A Linen module that computes as `inner` does, under fake quantization.

    Its variables are `inner`'s, under the same paths: wrap and unwrap a model without touching its parameters. Batch
    statistics and dropout work as in `inner`. Inside a larger model, it quantizes its own part only.

        model = linen.FakeQuantized(ResNet(), rules=(("kernel$", quantize.Affine(bits=8, activation_bits=8)),))

    Attributes:
      inner: the module.
      rules: as in `jaxcompress.quantize.fake`, on `inner`'s paths; a tuple of pairs, for Linen hashes modules.
    """

    inner: nn.Module
    rules: Rules[quantize.Affine | None]

    def setup(self) -> None:
        """Puts `inner`'s variables in this module's own place."""
        nn.share_scope(self, self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`inner(*args, **kwargs)`, with the chosen weights and their inputs rounded."""
        if self.is_initializing():
            return self.inner(*args, **kwargs)
        assert self.scope is not None
        mutable = [name for name in self.variables if self.is_mutable_collection(name) and name != "params"]
        rngs = {name: self.make_rng(name) for name in self.scope.rngs if name != "params"}
        apply = quantize.fake(self.inner.clone(parent=None).apply, self.rules)
        out, updates = apply(dict(self.variables), *args, **kwargs, rngs=rngs, mutable=mutable)
        for collection, variables in updates.items():
            for name, value in variables.items():
                self.put_variable(collection, name, value)
        return out


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
