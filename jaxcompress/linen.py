"""Flax Linen wrappers: the library's function transforms as modules."""

from typing import Any

import flax.linen as nn

from jaxcompress import quantize
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
