"""Models of the experiments, by name, so that a packed file can say which one its weights belong to."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Convnet(nn.Module):
    """Two convolutions with pooling, a hidden layer, and the classes.

    Attributes:
      width: channels of the first convolution; the second has twice as many, the hidden layer too.
      classes: outputs.
      normalise: batch normalisation behind each convolution.
      dropout: the rate before the last layer, in training.
    """

    width: int
    classes: int = 10
    normalise: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[batch, classes]` of images `[batch, height, width, channels]`."""
        x = images
        for channels in (self.width, 2 * self.width):
            x = nn.Conv(channels, (3, 3), use_bias=not self.normalise)(x)
            if self.normalise:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(2 * self.width)(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes)(x)


MODELS = {"convnet": Convnet}


def describe(model: nn.Module) -> dict[str, Any]:
    """The model's name and arguments, as JSON types; `build` makes it again."""
    name = next(name for name, cls in MODELS.items() if type(model) is cls)
    fields = {
        field: getattr(model, field) for field in type(model).__dataclass_fields__ if field not in ("parent", "name")
    }
    return {"model": name, **fields}


def build(description: dict[str, Any]) -> nn.Module:
    """The model that `describe` described."""
    fields = dict(description)
    return MODELS[fields.pop("model")](**fields)


def initialise(model: nn.Module, seed: int, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Fresh variables of a model for images of this shape, `[height, width, channels]`."""
    return dict(model.init(jax.random.key(seed), jnp.zeros((1, *image_shape))))
