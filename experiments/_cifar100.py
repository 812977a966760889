"""The networks, pairs and recipe of the literature's CIFAR-100 tables.

Tian, Krishnan and Isola, "Contrastive representation distillation", 2020, and Zhao et al., "Decoupled knowledge
distillation", 2022, compare methods on these eleven pairs. Every network names its stages `Stage_0`, `Stage_1`, ... so
that their maps can be captured; where the network has it so, a stage's result is not yet activated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

from experiments._resnets import Resnet

EMBEDDING = "embedding"
"""The name of what a `Staged` network's last layer sees, `[batch, channels]`, for `linen.capture`."""


class Conv(nn.Module):
    """A convolution and its batch normalisation."""

    width: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[batch, height, width, channels]` to `[..., width]`."""
        x = nn.Conv(
            self.width, (self.size,) * 2, strides=self.stride, padding=self.size // 2, use_bias=self.bias,
            feature_group_count=self.groups,
        )(x)  # fmt: skip
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions to four times the width, beside a shortcut; no activation at the end."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activated maps to maps of `4 * width` channels, not yet activated."""
        y = nn.relu(Conv(self.width, 1)(x, train))
        y = nn.relu(Conv(self.width, 3, self.stride)(y, train))
        y = Conv(4 * self.width, 1)(y, train)
        changes = self.stride != 1 or x.shape[-1] != 4 * self.width
        return y + (Conv(4 * self.width, 1, self.stride)(x, train) if changes else x)


class PreActivated(nn.Module):
    """A wide residual network's block: normalisation and activation stand before each convolution."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps to maps of `width` channels, neither normalised nor activated."""

        def active(y: jax.Array) -> jax.Array:
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(y))

        y = active(x)
        shortcut = x
        if x.shape[-1] != self.width:
            shortcut = nn.Conv(self.width, (1, 1), strides=self.stride, use_bias=False)(y)
        y = active(nn.Conv(self.width, (3, 3), strides=self.stride, use_bias=False)(y))
        return shortcut + nn.Conv(self.width, (3, 3), use_bias=False)(y)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expansion, a convolution a channel, and a linear 1x1 convolution."""

    width: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps to maps of `width` channels; linear at the end."""
        wide = x.shape[-1] * self.expansion
        y = nn.relu(Conv(wide, 1)(x, train))
        y = nn.relu(Conv(wide, 3, self.stride, groups=wide)(y, train))
        y = Conv(self.width, 1)(y, train)
        return x + y if self.stride == 1 and x.shape[-1] == self.width else y


def shuffled(x: jax.Array, groups: int) -> jax.Array:
    """Channels dealt out among the groups."""
    return x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)


class ShuffleUnit(nn.Module):
    """ShuffleNet's block; with stride 2 it joins its input's averages to its result. No activation at the end."""

    width: int
    stride: int = 1
    groups: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps to maps of `width` channels (with stride 2 also the input's)."""
        middle, first = self.width // 4, 1 if x.shape[-1] == 24 else self.groups
        y = shuffled(nn.relu(Conv(middle, 1, groups=first)(x, train)), first)
        y = nn.relu(Conv(middle, 3, self.stride, groups=middle)(y, train))
        y = Conv(self.width, 1, groups=self.groups)(y, train)
        if self.stride == 1:
            return x + y
        return jnp.concatenate([y, nn.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))], axis=-1)


class ShuffleUnit2(nn.Module):
    """ShuffleNetV2's block: half of the channels go by; with stride 2 both halves are convolved."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps to activated maps of `width` channels."""
        half = self.width // 2
        left, right = (x, x) if self.stride == 2 else (x[..., :half], x[..., half:])
        if self.stride == 2:
            left = Conv(x.shape[-1], 3, 2, groups=x.shape[-1])(left, train)
            left = nn.relu(Conv(half, 1)(left, train))
        right = nn.relu(Conv(half, 1)(right, train))
        right = Conv(half, 3, self.stride, groups=half)(right, train)
        right = nn.relu(Conv(half, 1)(right, train))
        return shuffled(jnp.concatenate([left, right], axis=-1), 2)


class Stage(nn.Module):
    """Blocks one after the other, with an activation between them where the network has one."""

    blocks: tuple[nn.Module, ...]
    active: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """As the blocks."""
        for i, block in enumerate(self.blocks):
            x = block.copy()(nn.relu(x) if i and self.active else x, train)
        return x


class Staged(nn.Module):
    """A first convolution, stages, an optional last one, and the classes.

    Attributes:
      stages: of each stage its blocks.
      stem: the first convolution, or None.
      last: a 1x1 convolution of so many channels behind the stages, or None.
      active: whether blocks leave the activation to what follows (`False`: a linear or activated end).
      normalised: whether the maps are normalised and activated behind the last stage only (pre-activation networks).
      pool: 2x2 pooling behind each stage but the last two.
      classes: outputs.
    """

    stages: tuple[tuple[nn.Module, ...], ...]
    stem: nn.Module | None = None
    last: int | None = None
    active: bool = True
    normalised: bool = False
    pool: bool = False
    classes: int = 100

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[batch, classes]` of images `[batch, 32, 32, 3]`."""
        x = images
        if self.stem is not None:
            x = self.stem.copy()(x, train) if isinstance(self.stem, Conv) else self.stem.copy()(x)
            x = nn.relu(x) if isinstance(self.stem, Conv) else x
        for i, blocks in enumerate(self.stages):
            x = Stage(blocks, self.active, name=f"Stage_{i}")(x, train)
            x = nn.relu(x) if self.active else x
            if self.pool and i < len(self.stages) - 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
        if self.normalised:
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        if self.last is not None:
            x = nn.relu(Conv(self.last, 1)(x, train))
        return nn.Dense(self.classes)(checkpoint_name(x.mean(axis=(1, 2)), EMBEDDING))


def resnet(layers: int, times: int = 1) -> nn.Module:
    """He et al. 2016; `times` 4 has four times the stages' widths and twice the first convolution's."""
    widths = (16 * times, 32 * times, 64 * times)
    return Resnet((layers - 2) // 6, widths, 100, stem_width=32 if times == 4 else None)


def wide_resnet(layers: int, times: int) -> nn.Module:
    """Zagoruyko and Komodakis 2016."""
    blocks = (layers - 4) // 6
    stages = tuple(
        tuple(PreActivated(16 * times * 2**i, 2 if i and j == 0 else 1) for j in range(blocks)) for i in range(3)
    )
    stem = nn.Conv(16, (3, 3), use_bias=False)
    return Staged(stages, stem, active=False, normalised=True)


def vgg(widths: Sequence[Sequence[int]]) -> nn.Module:
    """Simonyan and Zisserman 2015, with batch normalisation and one dense layer."""
    return Staged(tuple(tuple(Conv(w, bias=True) for w in stage) for stage in widths), pool=True)


def resnet50() -> nn.Module:
    """He et al. 2016's network for ImageNet, with a 3x3 first convolution and no pooling."""
    stages = tuple(
        tuple(Bottleneck(64 * 2**i, 2 if i and j == 0 else 1) for j in range(n)) for i, n in enumerate((3, 4, 6, 3))
    )
    return Staged(stages, Conv(64))


def mobile() -> nn.Module:
    """MobileNetV2 of half the width (Sandler et al. 2018)."""
    setting = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    stages = tuple(
        tuple(InvertedResidual(width // 2, stride if j == 0 else 1, expansion) for j in range(n))
        for expansion, width, n, stride in setting
    )
    return Staged(stages, Conv(16, stride=2), last=1280, active=False)


def shuffle1() -> nn.Module:
    """ShuffleNet of three groups (Zhang et al. 2018)."""
    stages, before = [], 24
    for width, n in ((240, 4), (480, 8), (960, 4)):
        stages.append((ShuffleUnit(width - before, 2), *(ShuffleUnit(width) for _ in range(n - 1))))
        before = width
    return Staged(tuple(stages), Conv(24, 1))


def shuffle2() -> nn.Module:
    """ShuffleNetV2 (Ma et al. 2018)."""
    stages = tuple(
        (ShuffleUnit2(width, 2), *(ShuffleUnit2(width) for _ in range(n)))
        for width, n in ((116, 3), (232, 7), (464, 3))
    )
    return Staged(stages, Conv(24, 1), last=1024, active=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: resnet(20),
    "resnet32": lambda: resnet(32),
    "resnet56": lambda: resnet(56),
    "resnet110": lambda: resnet(110),
    "resnet8x4": lambda: resnet(8, 4),
    "resnet32x4": lambda: resnet(32, 4),
    "WRN-16-2": lambda: wide_resnet(16, 2),
    "WRN-40-1": lambda: wide_resnet(40, 1),
    "WRN-40-2": lambda: wide_resnet(40, 2),
    "VGG8": lambda: vgg(((64,), (128,), (256,), (512,), (512,))),
    "VGG13": lambda: vgg(((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))),
    "ResNet50": resnet50,
    "MobileNetV2": mobile,
    "ShuffleNetV1": shuffle1,
    "ShuffleNetV2": shuffle2,
}


class Pair(NamedTuple):
    """A teacher and a student, by name, and what the table of Tian et al. has of them, where it has them."""

    teacher: str
    student: str
    published: tuple[float, float, float] | None
    """Test accuracies in % of the teacher, of the student from labels alone, and of the student by soft targets."""


PAIRS = (
    Pair("resnet56", "resnet20", (72.34, 69.06, 70.66)),
    Pair("resnet110", "resnet32", (74.31, 71.14, 73.08)),
    Pair("resnet32x4", "resnet8x4", (79.42, 72.50, 73.33)),
    Pair("WRN-40-2", "WRN-16-2", (75.61, 73.26, 74.92)),
    Pair("WRN-40-2", "WRN-40-1", (75.61, 71.98, 73.54)),
    Pair("VGG13", "VGG8", (74.64, 70.36, 72.98)),
    Pair("resnet32x4", "ShuffleNetV1", (79.42, 70.50, 74.07)),
    Pair("WRN-40-2", "ShuffleNetV1", (75.61, 70.50, 74.83)),
    Pair("VGG13", "MobileNetV2", (74.64, 64.60, 67.37)),
    Pair("ResNet50", "MobileNetV2", (79.34, 64.60, 67.35)),
    Pair("resnet32x4", "ShuffleNetV2", (79.42, 71.82, 74.45)),
)
"""The eleven pairs."""


@dataclass(frozen=True)
class Recipe:
    """The literature's training: SGD with momentum, 240 epochs, three drops; random crops and mirrored images."""

    epochs: int = 240
    batch_size: int = 64
    rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    drops: tuple[int, ...] = (150, 180, 210)
    """Epochs behind which the rate falls to a tenth."""
    padding: int = 4
    """Of the random crops."""

    @classmethod
    def of(cls, student: str, epochs: int = 240) -> "Recipe":
        """The recipe of a network; the light ones begin at 0.01. Other lengths drop at the same parts of the way."""
        light = student in ("MobileNetV2", "ShuffleNetV1", "ShuffleNetV2")
        drops = tuple(round(epochs * drop / cls.epochs) for drop in cls.drops)
        return cls(epochs, rate=0.01 if light else 0.05, drops=drops)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """SGD for epochs of so many steps; the weight decay passes through the momentum, as PyTorch's does."""
        schedule = optax.piecewise_constant_schedule(self.rate, {epoch * steps: 0.1 for epoch in self.drops})
        return optax.chain(optax.add_decayed_weights(self.weight_decay), optax.sgd(schedule, momentum=self.momentum))
