import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxcompress import distill
from jaxcompress.arrays import is_leaf
from jaxcompress.paths import named_leaves
from jaxcompress.targets._header import Header, compare, read_header, write_header
from jaxcompress.targets._parts import KEYS, Index, PartWriter, open_part, read_records
from jaxcompress.targets._records import decoded_logits, encode


def fingerprint(tree: Any) -> str:
    """The SHA-256 of a teacher's variables: names, dtypes, shapes and every byte, wherever they lie.

    Of a compressed weight also what says how its arrays are read, such as the bits that its inputs are rounded to.
    """
    digest = hashlib.sha256()
    for name, leaf in named_leaves(tree, is_leaf):
        if is_leaf(leaf):
            digest.update(f"{name} {type(leaf).__name__} {sorted(leaf.fields()[1].items())}\n".encode())
    for name, leaf in sorted(named_leaves(tree), key=lambda pair: pair[0]):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def build(
    directory: str | os.PathLike[str],
    predict: Callable[[Any], ArrayLike],
    batches: Iterable[tuple[ArrayLike, ArrayLike, Any]],
    *,
    teacher: str,
    data: str,
    dtype: str = "float32",
    top_k: int | float | None = None,
    temperatures: Sequence[float] = (1.0,),
    part_size: int = 8192,
) -> "TargetCache":
    """Computes and keeps the targets that are not kept yet, and opens the cache.

    Args:
      directory: made where it is not there. If a build was cut off, the same call goes on: `predict` runs only for
        batches with a key that is missing.
      predict: the teacher, from a batch's inputs to logits `[batch, ..., classes]`; jit it.
      batches: triples of the examples' numbers `[batch]`, the seeds of their augmentation (`[batch]`, or one number),
        and the inputs as augmented with them.
      teacher: the teacher's `fingerprint`.
      data: whatever tells the data set from others, such as its splits' hashes and the augmentation's name.
      dtype: "float32" or "bfloat16".
      top_k: keep only the most probable classes: how many, or which share of them (a float in (0, 1)).
      temperatures: with `top_k`, those at which the tail's weight is kept.
      part_size: records a file; what a cut-off build loses is less than one file. Files fill blocks of 64 KiB.

    Raises:
      TargetMismatchError: there is a cache of another teacher, data set or kind.
      ValueError: bad arguments, logits that are NaN, have no finite largest or change their shape, damaged files.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    if part_size < 1 or (top_k is not None and not temperatures) or any(t <= 0 for t in temperatures):
        raise ValueError(f"part_size and temperatures must be above 0, got {part_size} and {tuple(temperatures)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob("*.writing"):  # of a build that was cut off
        leftover.unlink()

    def header_for(shape: tuple[int, ...]) -> Header:
        k = None if top_k is None else distill.top_k_targets(np.zeros(shape[-1:]), top_k).indices.shape[-1]
        at = () if k is None else tuple(float(t) for t in temperatures)
        return Header(teacher=teacher, data=data, shape=shape, dtype=dtype, k=k, temperatures=at)

    cache = None
    if (directory / "header.json").exists():
        cache = TargetCache(directory, teacher=teacher, data=data)
        compare(directory, cache.header, header_for(cache.header.shape))
    writer: PartWriter | None = None
    for batch in batches:
        if not isinstance(batch, Sequence) or len(batch) != 3:
            raise ValueError(
                "batches are triples (examples' numbers, seeds of their augmentation or one number, inputs)"
            )
        examples, seeds, inputs = batch
        keys = _key_rows(examples, seeds)
        missing = np.ones(len(keys), bool) if cache is None else cache.find(keys) < 0
        if writer is not None:
            missing &= ~writer.has(keys)
        if not missing.any():
            continue
        logits = jnp.asarray(predict(inputs))
        if logits.ndim < 2 or len(logits) != len(keys):
            raise ValueError(f"predict must give [batch, ..., classes] for {len(keys)} examples, got {logits.shape}")
        header = header_for(logits.shape[1:])
        if cache is None:
            write_header(directory, header)
            cache = TargetCache(directory, teacher=teacher, data=data)
        compare(directory, cache.header, header)
        writer = writer or PartWriter(directory, part_size)
        writer.add(keys[missing], encode(header, logits)[missing])
    if writer is not None:
        writer.close()
    if cache is None:
        raise ValueError("there is nothing to keep: batches gave no example")
    return TargetCache(directory, teacher=teacher, data=data)


class TargetCache:
    """Kept targets, read by key. `len(cache)` is their number. A copy for another process opens the files anew.

    Args:
      directory: where `build` put them.
      teacher: the teacher's `fingerprint`.
      data: the data set's hash, as given to `build`.

    Raises:
      FileNotFoundError: there is no cache.
      TargetMismatchError: it is another teacher's, or another data set's.
      ValueError: it is damaged.
    """

    def __init__(self, directory: str | os.PathLike[str], *, teacher: str, data: str):
        self.directory = Path(directory)
        self.header = read_header(self.directory)
        compare(self.directory, self.header, replace(self.header, teacher=teacher, data=data))
        self._readers = []
        keys, places = [np.zeros((0, 2), KEYS)], [np.zeros((0, 2), np.int64)]
        for i, path in enumerate(sorted(self.directory.glob("part-*.array_record"))):
            reader, own = open_part(path)
            self._readers.append((path, reader))
            keys.append(own)
            places.append(np.stack([np.full(len(own), i), np.arange(len(own))], axis=1))
        self._places = np.concatenate(places)
        self._index = Index(np.concatenate(keys))

    def __reduce__(self) -> tuple[Any, ...]:
        opened_anew = functools.partial(TargetCache, teacher=self.header.teacher, data=self.header.data)
        return opened_anew, (self.directory.absolute(),)

    def __len__(self) -> int:
        return len(self._places)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The place of each key `[batch, 2]` (example, seed); -1 where there is none."""
        return self._index.find(keys)

    def logits(self, examples: ArrayLike, seeds: ArrayLike = 0) -> np.ndarray:
        """The teacher's logits, `[batch, ..., classes]`, float32.

        Args:
          examples: `[batch]`, the examples' numbers.
          seeds: of their augmentation: `[batch]`, or one number for all.

        Raises:
          KeyError: some are not kept; the message says how many, and the first.
          ValueError: the cache has top-k targets; the files are damaged.
        """
        if self.header.k is not None:
            raise ValueError(f"{self.directory} keeps the top {self.header.k} classes only: use top_k()")
        return decoded_logits(self._records(examples, seeds))

    def top_k(
        self, examples: ArrayLike, seeds: ArrayLike = 0, *, temperature: float | None = None
    ) -> distill.TopKTargets:
        """The teacher's top-k targets, for `distill.top_k_target_loss` at the same temperature.

        Args:
          examples: `[batch]`, the examples' numbers.
          seeds: of their augmentation: `[batch]`, or one number for all.
          temperature: one of those at which the tail was kept; by default the only one.

        Returns:
          Host arrays: indices int32, log-probabilities and log-tail float32. They sum to 1, rounded or not.

        Raises:
          KeyError, ValueError: as in `logits`; the tail was not kept at this temperature.
        """
        if self.header.k is None:
            raise ValueError(f"{self.directory} keeps all logits: use logits(), and distill.top_k_targets for few")
        kept = self.header.temperatures
        chosen = kept[0] if temperature is None and len(kept) == 1 else temperature
        if chosen not in kept:
            raise ValueError(f"the tail is kept at the temperatures {kept}, not at {temperature}; choose one of them")
        records = self._records(examples, seeds)
        log_tail = records["log_tail"][:, kept.index(chosen)].astype(np.float32)
        scaled = decoded_logits(records) / np.float32(chosen)
        scaled = scaled - scaled.max(axis=-1, keepdims=True)
        with np.errstate(divide="ignore"):  # a tail of everything leaves log 0
            mass = np.log(-np.expm1(np.minimum(log_tail, 0)))
        few = mass[..., None] + scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
        indices, log_p, tail = records["indices"].astype(np.int32), few.astype(np.float32), log_tail
        # of NumPy as all that is read here; the fields' type is that of the loss, which takes both
        return distill.TopKTargets(indices, log_p, tail)  # type: ignore[arg-type]

    def _records(self, examples: ArrayLike, seeds: ArrayLike) -> np.ndarray:
        keys = _key_rows(examples, seeds)
        found = self.find(keys)
        if (found < 0).any():
            example, seed = keys[found < 0][0].tolist()
            raise KeyError(
                f"{(found < 0).sum()} of {len(keys)} targets are not in {self.directory}, the first that of example "
                f"{example} with seed {seed}; if the build was cut off, run it again: it goes on where it ended"
            )
        parts, rows = self._places[found].T
        out = np.empty(len(keys), self.header.record())
        for part in np.unique(parts):
            mine = np.flatnonzero(parts == part)
            path, reader = self._readers[part]
            out[mine] = read_records(path, reader, rows[mine].tolist(), out.dtype)
        return out


def _key_rows(examples: ArrayLike, seeds: ArrayLike) -> np.ndarray:
    examples, seeds = np.asarray(examples), np.asarray(seeds)
    if examples.ndim != 1 or not all(np.issubdtype(x.dtype, np.integer) for x in (examples, seeds)):
        raise ValueError(f"examples must be integers [batch] and seeds integers, got {examples!r:.80}, {seeds!r:.80}")
    columns = examples, np.broadcast_to(seeds, examples.shape)  # of their own: uint64 beside int64 would become floats
    return np.stack([x.astype(KEYS) for x in columns], axis=1)
