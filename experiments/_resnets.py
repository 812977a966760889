"""Residual networks for small images, whose stages can be captured before their last activation."""

import flax.linen as nn
import jax


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (a 1x1 convolution where the shape changes); no activation at the end."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[batch, height, width, channels]`, activated, to `[..., width]`, not yet activated."""

        def normalised(size: int, stride: int, y: jax.Array) -> jax.Array:
            y = nn.Conv(self.width, (size, size), strides=stride, use_bias=False)(y)
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)

        y = normalised(3, 1, nn.relu(normalised(3, self.stride, x)))
        changes = self.stride != 1 or x.shape[-1] != self.width
        return y + (normalised(1, self.stride, x) if changes else x)


class Stage(nn.Module):
    """Blocks of one width; the last one's result is not yet activated."""

    width: int
    blocks: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """As `Block`."""
        for i in range(self.blocks):
            x = Block(self.width, self.stride if i == 0 else 1)(nn.relu(x) if i else x, train)
        return x


class Resnet(nn.Module):
    """The residual network of He et al. 2016 for CIFAR: three stages of `blocks`, `6 * blocks + 2` layers.

    Attributes:
      blocks: a stage.
      widths: channels of the stages.
      classes: outputs.
      stem_stride: of the first convolution; 1 in the paper, 2 for a quarter of the work.
      stem_width: channels of the first convolution; by default the first stage's.
    """

    blocks: int
    widths: tuple[int, int, int] = (16, 32, 64)
    classes: int = 10
    stem_stride: int = 1
    stem_width: int | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[batch, classes]` of images `[batch, height, width, channels]`."""
        x = nn.Conv(self.stem_width or self.widths[0], (3, 3), strides=self.stem_stride, use_bias=False)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for i, width in enumerate(self.widths):
            x = nn.relu(Stage(width, self.blocks, 1 if i == 0 else 2)(x, train))
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))
