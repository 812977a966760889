"""One of several real processes of one run: `python train_worker.py PORT COUNT INDEX CHECKPOINTS OUT`."""

import sys

import jax
import numpy as np
import optax
import pytest
from train_toys import create, dataset, loss_fn, teacher_variables

from jaxcompress import train


def main(port: str, count: str, index: str, checkpoints: str, out: str) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    mesh, tx = train.make_mesh(), optax.sgd(0.1, momentum=0.9)
    assert mesh.shape["data"] == int(count) and len(jax.local_devices()) == 1
    step, teacher = train.make_step(loss_fn, tx), train.shard(teacher_variables(), mesh)
    batch = next(iter(dataset(host=int(index), hosts=int(count)).to_iter_dataset()))
    uneven = jax.tree.map(lambda x: x[int(index) :], batch)
    with pytest.raises(ValueError, match="every process must hand in batches of the same shapes; by process they are"):
        train.make_step(loss_fn, tx)(train.shard(create(tx), mesh), uneven, teacher)
    metrics = train.JsonLines(out + ".jsonl")
    for steps in (7, 12):  # the second call resumes from what the first one saved
        data = iter(dataset(host=int(index), hosts=int(count)).to_iter_dataset())
        state = train.shard(create(tx), mesh)
        state = train.fit(
            step,
            state,
            data,
            steps=steps,
            frozen=teacher,
            checkpoints=checkpoints,
            on_metrics=metrics,
            checkpoint_every=5,
        )
    leaves = jax.tree.leaves((state.params, state.opt_state, state.extras))
    np.savez(f"{out}.{index}.npz", *[np.asarray(x) for x in leaves])


if __name__ == "__main__":
    main(*sys.argv[1:])
