"""Batches with a position that can be saved: grain batches shuffled indices, and arrays are gathered."""

from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import grain
import numpy as np

from experiments._splits import Split

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""From an image `[height, width, channels]`, float32, and a generator to an image of the same shape and dtype."""


class Batch(TypedDict):
    """`image`: `[batch, height, width, channels]`, float32 in [0, 1]; `label`: `[batch]`, int32."""

    image: np.ndarray
    label: np.ndarray


class Batches(Iterator[Batch]):
    """An iterator of batches whose position can be taken and set.

    Batch `k` is a pure function of the split, the seed, the batch size and `k`, so the position is one number, and
    it can be restored in another process and on another number of hosts.
    """

    def __init__(self, iterator: grain.DatasetIterator, stream: str) -> None:
        self._iterator = iterator
        self._stream = stream

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON types: grain's own state, and which stream of batches it is a position in."""
        return {"grain": self._iterator.get_state(), "stream": self._stream}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave, of this or another iterator over the same stream.

        Raises:
          ValueError: the position belongs to another stream (other data, seed, batch size or augmentation).
        """
        if state.get("stream") != self._stream:
            raise ValueError(
                f"this position is of the stream {state.get('stream')!r}, but the iterator is over {self._stream!r}:"
                " resume with the same data, seed and batch size, or start anew"
            )
        self._iterator.set_state(state["grain"])


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epochs: int | None = None,
    augment: Augment | None = None,
    host: int = 0,
    hosts: int = 1,
) -> Batches:
    """Shuffled training batches of a split.

    Each epoch is a new permutation of the examples. Epochs follow each other without a gap, so that each example comes
    once an epoch whether or not the batch size divides the split; a last short batch is left out.

    Args:
      split: train or validation examples.
      batch_size: examples a batch, over all hosts.
      seed: of shuffling and augmentation. Streams of different seeds share no epoch's permutation.
      epochs: how many; `None` goes on for ever.
      augment: applied to each image, with a generator that depends on the seed and the example's place in the stream.
      host, hosts: this process takes every `hosts`-th example of each batch, beginning with number `host`: the hosts'
        batches together are exactly the batch of a single process.

    Returns:
      An iterator with `get_state()` and `set_state(state)`.

    Raises:
      ValueError: the split is the test split, or sizes and numbers do not fit.
    """
    if split.name == "test":
        raise ValueError("test data are not for training: batches() takes dataset.train or dataset.validation")
    if batch_size < 1 or not 0 <= host < hosts or batch_size % hosts:
        raise ValueError(
            f"cannot share a batch of {batch_size} out to hosts numbered 0 to {hosts - 1}, this one {host}"
        )
    if epochs is not None and epochs * len(split) < batch_size:
        raise ValueError(f"{epochs} epochs of {len(split)} examples do not fill one batch of {batch_size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative: {seed}")

    indices = _Shuffled(len(split), seed).repeat(epochs)
    if augment is None:
        data = indices[host::hosts].batch(batch_size // hosts, drop_remainder=True, batch_fn=np.asarray)
        data = data.map(lambda chosen: _gather(split, chosen))
    else:
        data = indices.map(lambda chosen: _gather(split, chosen))
        data = data.random_map(lambda example, rng: _augmented(example, augment, rng), seed=seed)
        data = data[host::hosts].batch(batch_size // hosts, drop_remainder=True)
    # no read-ahead threads: gathering from memory is cheap, and JAX's own dispatch runs beside it
    iterator = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
    how = f"augment {getattr(augment, '__qualname__', type(augment).__name__)}, " if augment else ""
    return Batches(iterator, f"{split.name} {split.sha256[:16]}, batch size {batch_size}, {how}seed {seed}")


class _Shuffled(grain.MapDataset[int]):
    """The indices of `size` examples, in another order every epoch.

    grain's own `shuffle` takes 60 microseconds an index for a thousand examples, and more for fewer: it is made for
    millions. It also gives epoch e of seed s the order of epoch e + 1 of seed s - 1, so that seeds 0 to 4 would see the
    same orders. Here an order is that of raw random numbers, whose stream NumPy keeps from version to version.
    """

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        self._size, self._seed = size, seed
        self._latest: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, self._size)
        latest, order = self._latest
        if epoch != latest:
            numbers = np.random.Philox(np.random.SeedSequence([self._seed, epoch])).random_raw(self._size)
            order = np.argsort(numbers, kind="stable").tolist()
            self._latest = (epoch, order)
        return order[place]


def _gather(split: Split, chosen: Any) -> Batch:
    """The examples of one index, or of an array of indices."""
    images = split.images[chosen].astype(np.float32) / np.float32(split.scale)
    return {"image": images, "label": split.labels[chosen]}


def _augmented(example: Batch, augment: Augment, rng: np.random.Generator) -> Batch:
    before, image = example["image"], augment(example["image"], rng)
    if image.shape != before.shape or image.dtype != np.float32:
        raise ValueError(
            f"augment must keep an image's shape {before.shape} and float32; it gave {image.shape} {image.dtype}"
        )
    return {"image": image, "label": example["label"]}
