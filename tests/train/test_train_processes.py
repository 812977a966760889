import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from train_toys import create, dataset, loss_fn, teacher_variables

from jaxcompress import train

HERE = Path(__file__).resolve()


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_processes(count, *arguments, timeout=300):
    """Runs `train_worker.py` in `count` processes at once; none outlives this call."""
    path = os.pathsep.join([str(HERE.parent), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", str(HERE.parent / "train_worker.py"), str(free_port()), str(count)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [*command, str(i), *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """Each feeds half of every batch, both save and resume; dropout and batch statistics are those of the whole."""
    run_processes(2, tmp_path / "checkpoints", tmp_path / "two")

    tx = optax.sgd(0.1, momentum=0.9)
    step, state, halves = train.make_step(loss_fn, tx), create(tx), [dataset(host=i, hosts=2) for i in range(2)]
    whole = (jax.tree.map(lambda *rows: np.concatenate(rows), *(half[k] for half in halves)) for k in range(12))
    losses = []
    state = train.fit(
        step, state, whole, steps=12, frozen=teacher_variables(), on_metrics=lambda n, m: losses.append(m["loss"])
    )
    expected = jax.tree.leaves((state.params, state.opt_state, state.extras))
    first, second = (np.load(tmp_path / f"two.{i}.npz") for i in range(2))
    assert len(first.files) == len(expected)
    for name, x in zip(first.files, expected, strict=True):
        assert first[name].tobytes() == second[name].tobytes()
        np.testing.assert_allclose(first[name], x, atol=2e-6, rtol=2e-5)
    written = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == list(range(1, 13))
    assert [line["loss"] for line in written] == pytest.approx(losses, rel=1e-5)
    with train.Checkpoints(tmp_path / "checkpoints") as checkpoints:  # one process reads what two have written
        restored, position = checkpoints.restore(create(tx))
        assert (int(restored.step), position["next_index"]) == (12, 12)
