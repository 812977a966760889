"""What the experiments on channels share: a network at one size, what is cut out of it, and its training.

All cuts of like widths share one compiled program: nothing in a residual network depends on which channels are left,
only on how many. That each smaller network is the whole one with zeroed channels is checked each time one is made.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._distilling import Room, jittered
from experiments._pruning import sgd
from jaxcompress import distill
from jaxcompress.paths import named_leaves, with_leaves
from jaxcompress.prune import channels

Variables = Any
Scores = Mapping[str, np.ndarray]
STATE = "batch_stats"
TEMPERATURE, ALPHA = 4.0, 0.9


class Options(Protocol):
    """What a training needs to know of a configuration."""

    @property
    def shift(self) -> int:
        """Pixels by which images are moved in training; 0: they are shown as they are."""


def whole(room: Room, model: nn.Module, options: Options) -> "Network":
    """The network of a Linen module with batch normalisation or without."""

    def evaluate(variables: Variables, images: jax.Array) -> Any:
        return model.apply(variables, images)

    def train(variables: Variables, images: jax.Array) -> Any:
        return model.apply(variables, images, train=True, mutable=[STATE])

    return Network(room, options, evaluate, train, jax.eval_shape(lambda: room.init(model, 0)))


class Network:
    """A function of variables (parameters and batch statistics) at one size, and its compiled programs.

    Args:
      room: the data.
      options: how images are changed in training.
      evaluate: `(variables, images) -> logits`.
      train: `(variables, images) -> (logits, new state)`.
      shapes: of the variables.
    """

    def __init__(self, room: Room, options: Options, evaluate: Any, train: Any, shapes: Variables) -> None:
        self.room, self.options, self.evaluate, self.train, self.shapes = room, options, evaluate, train, shapes
        self._logits = jax.jit(evaluate)
        self._smaller: dict[Any, Network] = {}
        self._steps: dict[Any, Callable[..., Any]] = {}
        self._gradient = jax.jit(jax.grad(self._loss_of_evaluation))

    @cached_property
    def groups(self) -> channels.Groups:
        """Of the network in evaluation, for one image."""
        return channels.groups(self.evaluate, self.shapes, self.room.images[:1])

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(x.size for x in jax.tree.leaves(self.shapes["params"]))

    def smaller(self, plan: channels.Plan, rederive: bool = False) -> "Network":
        """What the plan leaves; plans of like widths share it."""
        key = (*plan.widths.items(), rederive)
        if key not in self._smaller:
            freed = dataclasses.replace(plan, free_out=(f"^1/{STATE}",) if STATE in self.shapes else ())
            small = channels.shrink(self.evaluate, self.shapes, plan, rederive=rederive)
            trained = channels.shrink(self.train, self.shapes, freed, rederive=rederive)
            self._smaller[key] = Network(self.room, self.options, small, trained, plan.apply(self.shapes))
        return self._smaller[key]

    def cut(self, plan: channels.Plan, variables: Variables, rederive: bool = False) -> tuple["Network", Variables]:
        """The smaller network and its variables, which are checked against the zeroed whole one if they should agree.

        Raises:
          RuntimeError: they differ.
        """
        network, small = self.smaller(plan, rederive), plan.apply(variables)
        if not rederive:
            images = self.room.validation[0][:1000]
            wanted, found = self.logits(plan.mask(variables), images), network.logits(small, images)
            if not bool(jnp.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(jnp.abs(wanted).max()))):
                raise RuntimeError(f"the smaller network differs by {float(jnp.abs(found - wanted).max())}")
        return network, small

    def logits(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Logits `[examples, classes]` in evaluation."""
        parts = [self._logits(variables, images[i : i + 1000]) for i in range(0, len(images), 1000)]
        return jnp.concatenate(parts)

    def accuracy(self, variables: Variables, images: jax.Array, labels: jax.Array) -> float:
        """Per cent of the images that are classified rightly."""
        return 100 * float(jnp.mean(jnp.argmax(self.logits(variables, images), axis=-1) == labels))

    def trained(
        self,
        variables: Variables,
        *,
        seed: int,
        epochs: int,
        rate: float,
        stop: int | None = None,
        teacher: tuple["Network", Variables] | None = None,
        penalty: optax.GradientTransformation | None = None,
    ) -> Variables:
        """The variables after SGD with momentum along a cosine; with a teacher, under its soft targets.

        Args:
          variables: to begin with.
          seed: of the order of the examples and of their changes.
          epochs: how long.
          rate: the largest learning rate.
          stop: after so many epochs of them.
          teacher: a network and its variables, which see the same images.
          penalty: stands before the optimizer.
        """
        room, step = self.room, self._step(teacher[0] if teacher and self._changes else None, penalty)
        numbers = {"rate": rate, "total": epochs * room.steps, "alpha": ALPHA if teacher else 0.0}
        knobs = jax.tree.map(jnp.float32, numbers)
        if teacher is not None and self._changes:
            taught = teacher[1]
        else:  # the same images at each epoch: one table of logits will do
            classes = room.dataset.classes
            taught = teacher[0].logits(teacher[1], room.images) if teacher else jnp.zeros((len(room.labels), classes))
        state = _optimizer(penalty)(knobs).init(variables["params"])
        variables = jax.tree.map(jnp.array, variables)  # the step takes its arguments' memory
        order, key, count = np.random.default_rng(seed), jax.random.key(seed), itertools.count()
        for _ in range(epochs if stop is None else stop):
            for index in order.permutation(len(room.labels))[: room.steps * room.batch].reshape(room.steps, -1):
                at = jax.random.fold_in(key, next(count))
                variables, state = step(variables, state, knobs, taught, room.images, room.labels, index, at)
        return variables

    @property
    def _changes(self) -> bool:
        return self.options.shift > 0

    def _step(self, teacher: "Network | None", penalty: Any) -> Any:
        """One compiled training step for each way of training."""
        if (teacher, penalty) in self._steps:
            return self._steps[teacher, penalty]

        def step(
            variables: Variables,
            optimizer: Any,
            knobs: Any,
            taught: Any,
            images: Any,
            labels: Any,
            index: Any,
            key: Any,
        ) -> Any:
            params, state = variables["params"], {k: x for k, x in variables.items() if k != "params"}
            shown = changed(images[index], key, self.options.shift)
            targets = teacher.evaluate(taught, shown) if teacher else taught[index]

            def loss(params: Any) -> Any:
                logits, new = self.train({"params": params, **state}, shown)
                losses = distill.distillation_loss(
                    logits, targets, labels[index], alpha=knobs["alpha"], temperature=TEMPERATURE
                )
                return jnp.mean(losses), new

            gradients, new = jax.grad(loss, has_aux=True)(params)
            updates, optimizer = _optimizer(penalty)(knobs).update(gradients, optimizer, params)
            return {"params": optax.apply_updates(params, updates), **new}, optimizer

        self._steps[teacher, penalty] = jax.jit(step, donate_argnums=(0, 1))
        return self._steps[teacher, penalty]

    def _loss_of_evaluation(self, variables: Variables, images: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(distill.hard_label_loss(self.evaluate(variables, images), labels))

    def gradients(self, variables: Variables, examples: int) -> Variables:
        """Of the loss in evaluation, over training images."""
        return self._gradient(variables, self.room.images[:examples], self.room.labels[:examples])

    def squared_gradients(self, variables: Variables, examples: int) -> Variables:
        """The mean over training images of each one's squared gradient."""
        total = jax.tree.map(jnp.zeros_like, variables)
        for i in range(examples):
            one = self._gradient(variables, self.room.images[i : i + 1], self.room.labels[i : i + 1])
            total = jax.tree.map(lambda t, g: t + jnp.square(g) / examples, total, one)
        return total


def _optimizer(penalty: Any) -> Callable[[Any], optax.GradientTransformation]:
    return sgd if penalty is None else lambda knobs: optax.chain(penalty, sgd(knobs))


def changed(images: jax.Array, key: jax.Array, shift: int) -> jax.Array:
    """Images moved by up to `shift` pixels each way, and every other one mirrored; as they are if it is 0."""
    if not shift:
        return images
    move, flip = jax.random.split(key)
    turned = jax.random.bernoulli(flip, shape=(len(images), 1, 1, 1))
    return jittered(shift)(jnp.where(turned, images[:, :, ::-1], images), move)


def drawn_for(variables: Variables, plan: channels.Plan) -> Variables:
    """Initial variables of the whole network, cut, and spread as wide as fewer inputs ask for.

    Flax draws kernels with a variance of one over the inputs, so this is the initialisation of the smaller network.
    """
    small = plan.apply(variables)
    leaves = []
    for (name, old), new in zip(named_leaves(variables), jax.tree.leaves(small), strict=True):
        inputs = [int(np.prod(x.shape[:-1])) for x in (old, new)]
        leaves.append(new * np.float32((inputs[0] / inputs[1]) ** 0.5) if name.endswith("kernel") else new)
    return with_leaves(small, leaves)
