import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxcompress.arrays import is_leaf
from jaxcompress.train._state import TrainState

_FORMAT = 1
_AS_BYTES = {"uint2", "uint4", "float8_e4m3"}
"""Dtypes that orbax has no place for: saved as uint8."""


class CheckpointMismatchError(ValueError):
    """A checkpoint that holds another model, or another optimizer's state, than the one to be restored."""


class Checkpoints:
    """The checkpoints of one run, in one directory: the training state, the data's position, the metrics.

    A save returns as soon as the state is copied off the devices; the files are written behind it. A checkpoint is
    there in whole or not at all: one that was being written when the process died is ignored, and cleared away before
    the next one is saved. With several processes all of them call every method, on a shared file system.

        with Checkpoints("run/checkpoints", keep_last=2, best="eval/accuracy") as checkpoints:
            state = fit(step, state, batches, steps=10_000, checkpoints=checkpoints, checkpoint_every=500, ...)
            state, _ = checkpoints.restore(state, step=checkpoints.best_step())

    Args:
      directory: made where it is not there.
      keep_last: how many of the latest checkpoints to keep.
      best: the name of a metric; the checkpoint where it was best is kept too.
      best_mode: whether the metric is best at its "max" or its "min".
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        best: str | None = None,
        best_mode: Literal["max", "min"] = "max",
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}: a run resumes from the latest checkpoint")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode must be 'max' or 'min', got {best_mode!r}")
        if "://" in str(directory):  # `Path` would make a local directory of it
            raise ValueError(f"checkpoints go into a directory of a mounted file system, got the address {directory}")
        self.directory = Path(directory).absolute()
        self.best = best
        keep: list[Any] = [ocp.checkpoint_managers.LatestN(keep_last)]
        ranking: dict[str, Any] = {}
        if best is not None:
            worst = -math.inf if best_mode == "max" else math.inf

            def rank(metrics: Mapping[str, float]) -> float:
                return worst if math.isnan(metrics[best]) else metrics[best]  # NaN has no place in an order

            keep.append(
                ocp.checkpoint_managers.BestN(
                    get_metric_fn=rank, reverse=best_mode == "min", n=1, keep_checkpoints_without_metrics=False
                )
            )
            ranking = {"best_fn": rank, "best_mode": best_mode}
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
                **ranking,
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the latest whole checkpoint, or `None`."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the checkpoint with the best metric, or `None`."""
        if self.best is None:
            raise ValueError("no metric to judge by: make it Checkpoints(directory, best='name of a metric')")
        return self._manager.best_step()

    def all_steps(self) -> list[int]:
        """The steps of all checkpoints that are there, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self, state: TrainState, data: Mapping[str, Any] | None = None, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Saves the state under its own step number; `state` may be donated as soon as this returns.

        Args:
          state: arrays of any dtype and sharding, typed keys included.
          data: this process's data position, JSON values only.
          metrics: what the best checkpoint is judged by.

        Raises:
          ValueError: there is a checkpoint of this step or a later one; `metrics` lacks the metric to judge by.
          TypeError: `data` is not JSON.
        """
        step = int(state.step)
        if self.best is not None and self.best not in (metrics or {}):
            raise ValueError(f"the best checkpoint is judged by {self.best!r}; step {step} has {sorted(metrics or {})}")
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(
                f"{self.directory} has a checkpoint of step {latest}, so none of step {step} can follow; resume from "
                f"it, or use another directory"
            )
        positions = gather(to_json(data))
        leaves = _named(state)
        described = {name: _describe(leaf) for name, leaf in leaves.items()}
        meta = {"format": _FORMAT, "leaves": described, "static": _static(state)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                # a flat dict: no class of the model's is needed to read it back, and names say what differs
                state=ocp.args.StandardSave({name: _storable(x) for name, x in leaves.items() if x.size}),
                data=ocp.args.JsonSave({"positions": positions}),
                meta=ocp.args.JsonSave(meta),
            ),
            metrics=None if metrics is None else dict(metrics),
            force=True,  # orbax would leave a save out without a word
        )

    def restore(self, state: TrainState, step: int | None = None, *, release: bool = False) -> tuple[TrainState, Any]:
        """(the saved state, this process's data position as it was saved).

        Args:
          state: a state of the same model and optimizer, of arrays or `jax.ShapeDtypeStruct`s; each array comes back
            where the one here lies, on whatever mesh it was saved. It is read for its structure only.
          step: which checkpoint; the latest by default.
          release: free the arrays of `state` once the checkpoint is known to fit, so that two never stand side by side.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          CheckpointMismatchError: the checkpoint is another model's; the message names the first differing paths.
          ValueError: the checkpoint is damaged; the data position is another number of processes'.
        """
        there = self.all_steps()
        step = self.latest_step() if step is None else step
        if step is None or step not in there:
            which = "" if step is None else f" of step {step}"
            raise FileNotFoundError(f"no checkpoint{which} in {self.directory}; there are {there or 'none'}")
        read = self._read(step, data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore())
        targets = _named(_targets(state))
        self._compare(step, read.meta, targets, _static(state))
        position = self._position(step, read.data["positions"])
        if release:
            jax.tree.map(lambda x: x.delete(), state)
        wanted = {
            name: jax.ShapeDtypeStruct(x.shape, jnp.uint8, sharding=x.sharding) if x.dtype.name in _AS_BYTES else x
            for name, x in targets.items()
            if x.size
        }
        restored = self._read(step, state=ocp.args.StandardRestore(wanted)).state
        leaves = [
            _recast(restored[name], x.dtype) if x.size else jnp.zeros(x.shape, x.dtype, device=x.sharding)
            for name, x in targets.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), position

    def wait(self) -> None:
        """Returns when what is being saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads behind the saves."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # tensorstore, json and orbax each raise their own
            raise ValueError(
                f"checkpoint {step} in {self.directory} cannot be read: it is damaged, or not of this package ({error})"
            ) from error

    def _compare(self, step: int, meta: Any, targets: Mapping[str, Any], static: Mapping[str, str]) -> None:
        where = f"checkpoint {step} in {self.directory}"
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
            raise CheckpointMismatchError(f"{where} was not written by this version of jaxcompress.train")
        there, here = dict(meta["leaves"]), {name: _describe(x) for name, x in targets.items()}
        for name in static.keys() & meta.get("static", {}).keys():  # those that both know
            there[name], here[name] = meta["static"][name], static[name]
        differing = [name for name in [*here, *(there.keys() - here.keys())] if there.get(name) != here.get(name)]
        if differing:
            differing.sort(key=lambda name: (not name.startswith("params"), name))  # the rest follows from them
            shown = "; ".join(
                f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
                for name in differing[:5]
            )
            raise CheckpointMismatchError(
                f"{where} holds another model or optimizer: {len(differing)} of {len(here)} leaves differ. {shown}"
            )

    def _position(self, step: int, positions: list[Any]) -> Any:
        if len(positions) == jax.process_count():
            return positions[jax.process_index()]
        if all(position == positions[0] for position in positions):
            return positions[0]
        raise ValueError(
            f"checkpoint {step} in {self.directory} has the data positions of {len(positions)} processes, which "
            f"differ, and here are {jax.process_count()}; resume on as many, or deal the data out so that all are equal"
        )


@contextlib.contextmanager
def opened(checkpoints: Checkpoints | str | os.PathLike[str] | None) -> Iterator[Checkpoints | None]:
    """What the caller gave, opened and closed here if it was a directory."""
    if checkpoints is None or isinstance(checkpoints, Checkpoints):
        yield checkpoints
        if checkpoints is not None:
            checkpoints.wait()
    else:
        with Checkpoints(checkpoints) as mine:
            yield mine


def _named(state: Any) -> dict[str, Any]:
    """Every leaf of the state by its whole path."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise ValueError(f"two leaves of the state have the path {name!r}; rename one")
        leaves[name] = leaf
    return leaves


def _static(state: Any) -> dict[str, str]:
    """What says how each compressed leaf's arrays are read, by the leaf's path and the field's name."""
    found: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_leaf):
        if is_leaf(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found |= {f"{name}/{field}": repr(value) for field, value in leaf.fields()[1].items()}
    return found


def _describe(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _targets(state: Any) -> Any:
    """What to restore, and where. An array that was put nowhere (a step, a key) goes where those that were lie."""
    put = [x.sharding for x in jax.tree.leaves(state) if x.sharding is not None and getattr(x, "committed", True)]
    home = next((s for s in put if isinstance(s, jax.sharding.SingleDeviceSharding)), None)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(x: Any) -> jax.ShapeDtypeStruct:
        place = x.sharding if getattr(x, "committed", True) else home or x.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place or here)

    return jax.tree.map(target, state)


def _storable(x: Any) -> Any:
    return _recast(x, jnp.dtype(jnp.uint8)) if x.dtype.name in _AS_BYTES else x


def _recast(x: Any, dtype: Any) -> Any:
    """A float's bits as an integer or back; an integer in a wider type or back."""
    if x.dtype == dtype:
        return x
    if jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(x, dtype)
    return x.astype(dtype)


def to_json(data: Any) -> str:
    """A data position as it is saved."""
    try:
        return json.dumps(data)
    except TypeError as error:
        raise TypeError(f"a data position must be JSON (dicts, lists, numbers, strings), got {data!r:.200}") from error


def gather(text: str) -> list[Any]:
    """Every process's JSON value, in the processes' order."""
    if jax.process_count() == 1:
        return [json.loads(text)]
    encoded = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(encoded)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]
