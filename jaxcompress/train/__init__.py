"""Training a student under frozen teachers, on one device or on many, in a run that can be cut off anywhere.

Nothing here knows a model, a loss or a compression technique: the step gets them as functions. `TrainState` is what a
step carries (parameters, optimizer, batch statistics, a key); `make_step` jits one donated step around a loss function
and an optimizer; `make_mesh`, `shard` and `shardings` lay states and teachers out by path rules, and the step follows;
`fit` runs it, with `Checkpoints` from which a killed run resumes bit for bit, data position included.

    state = train.TrainState.create(params, tx, key=jax.random.key(0))
    step = train.make_step(loss_fn, tx)                 # loss_fn(params, batch, context) -> (loss, metrics, extras)
    state = train.fit(step, state, batches, steps=1000, frozen=teacher, checkpoints="run", checkpoint_every=100)
"""

from jaxcompress.train._checkpoint import CheckpointMismatchError, Checkpoints
from jaxcompress.train._loop import NonFiniteError, ResumableIterator, fit
from jaxcompress.train._metrics import JsonLines
from jaxcompress.train._sharding import make_mesh, shard, shard_batch, shardings
from jaxcompress.train._state import TrainState
from jaxcompress.train._step import Context, LossFn, Step, make_step

__all__ = [
    "CheckpointMismatchError",
    "Checkpoints",
    "Context",
    "JsonLines",
    "LossFn",
    "NonFiniteError",
    "ResumableIterator",
    "Step",
    "TrainState",
    "fit",
    "make_mesh",
    "make_step",
    "shard",
    "shard_batch",
    "shardings",
]
