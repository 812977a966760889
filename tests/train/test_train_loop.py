import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from train_toys import assert_close, assert_same, batches, create, loss_fn, teacher_variables

from jaxcompress import train


class Killed(BaseException):
    """Nothing in the loop may catch it."""


class Counting:
    """Endless batches that say how often they were asked, and where they stand."""

    def __init__(self, batch=lambda n: np.float32(n)):
        self.position, self._batch = 0, batch

    def __next__(self):
        self.position += 1
        return self._batch(self.position)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def scalar(tx=None, start=1.0):
    """A state of one number, and a step whose loss is it times the batch."""
    tx = tx or optax.sgd(0.01)
    state = train.TrainState.create(jnp.float32(start), tx, key=jax.random.key(0))
    return train.make_step(lambda p, batch, c: (p * batch, {"batch": batch}, c.extras), tx), state


def test_a_killed_run_resumes_as_if_it_had_not_been(tmp_path):
    """Parameters, optimizer, batch statistics, dropout keys and data position; in the middle of an accumulation."""
    tx = optax.MultiSteps(optax.inject_hyperparams(optax.sgd)(optax.cosine_decay_schedule(0.1, 20), momentum=0.9), 2)
    mesh, rules = train.make_mesh(data=4, model=2), [("Dense_0/kernel", P(None, "model"))]
    fit = functools.partial(
        train.fit, train.make_step(loss_fn, tx), steps=20, frozen=train.shard(teacher_variables(), mesh)
    )

    def fresh():
        return train.shard(create(tx), mesh, rules)

    straight, losses = batches(), {}
    expected = fit(fresh(), straight, on_metrics=lambda n, m: losses.update({n: m}))

    def kill(n, metrics):
        if n == 13:
            raise Killed

    with pytest.raises(Killed):
        fit(fresh(), batches(), checkpoints=tmp_path, checkpoint_every=11, on_metrics=kill)
    again, resumed = {}, batches()
    state = fit(fresh(), resumed, checkpoints=tmp_path, on_metrics=lambda n, m: again.update({n: m}))
    assert_same(state, expected)
    assert sorted(again) == list(range(12, 21)) and all(again[n] == losses[n] for n in again)
    assert resumed.get_state() == straight.get_state()
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, expected)


def test_a_run_resumes_on_another_mesh(tmp_path):
    tx = optax.adam(1e-2)

    def fresh():
        params = {"kernel": jnp.arange(32.0).reshape(4, 8) / 32}
        return train.TrainState.create(params, tx, key=jax.random.key(0))

    def loss(params, batch, context):
        noise = jax.random.normal(context.key, (8, 4))
        return jnp.mean((noise @ params["kernel"] - batch) ** 2), {}, context.extras

    step = train.make_step(loss, tx)
    rows = functools.partial(Counting, lambda n: np.full((8, 8), n, np.float32))
    alone = train.fit(step, fresh(), rows(), steps=3, checkpoints=tmp_path)
    spread = train.shard(fresh(), train.make_mesh(data=2, model=4), [("kernel", P("model", "data"))])
    with train.Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(spread)[0], alone)
    spread = train.fit(step, spread, rows(), steps=9, checkpoints=tmp_path)
    assert spread.params["kernel"].sharding.spec == P("model", "data")
    assert_close(spread, train.fit(step, fresh(), rows(), steps=9))


WORKER = """
    import sys
    import jax, jax.numpy as jnp, numpy as np, optax
    from train_toys import batches, create, loss_fn, teacher_variables
    from jaxcompress import train

    tx = optax.adam(1e-2)
    ballast = np.random.default_rng(0).normal(size=12_000_000).astype(np.float32)  # a save takes a while

    def loss(params, batch, context):
        stats = {"batch_stats": context.extras["batch_stats"]}
        value, metrics, extras = loss_fn(params, batch, context._replace(extras=stats))
        return value, metrics, {**extras, "ballast": context.extras["ballast"]}

    step, teacher = train.make_step(loss, tx), teacher_variables()
    for directory in sys.argv[1:]:
        plain = create(tx)
        state = train.TrainState.create(
            plain.params, tx, extras={**plain.extras, "ballast": ballast}, key=plain.key
        )
        state = train.fit(
            step, state, batches(), steps=12, frozen=teacher, checkpoints=directory, checkpoint_every=4,
            on_metrics=train.JsonLines(directory + ".jsonl"),
        )
        leaves = jax.tree.leaves((state.params, state.opt_state, state.extras))
        np.savez(directory + ".npz", *[np.asarray(x) for x in leaves])
"""


def worker(*directories):
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parent), str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(WORKER), *map(str, directories)]
    return subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path})


@pytest.mark.slow
def test_a_save_cut_off_by_sigkill_is_ignored(tmp_path):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = worker(cut)
    try:
        deadline = time.monotonic() + 240
        while not (partial := [path for path in cut.glob("8*") if path.name != "8"]):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert partial[0].exists() and not (cut / "8").exists(), "the save ended before the signal came"
        other = Path(shutil.copytree(cut, tmp_path / "other"))
        with train.Checkpoints(other, keep_last=9) as checkpoints:
            assert checkpoints.all_steps() == [4]
            checkpoints.save(dataclasses.replace(scalar()[1], step=jnp.int32(5)))
        assert {path.name for path in other.iterdir()} == {"4", "5"}
        process = worker(cut, whole)  # resumes the one, and runs the other straight
        assert process.wait(240) == 0
    finally:
        process.kill()
        process.wait()
    assert (cut / "12").exists()
    resumed, straight = np.load(tmp_path / "cut.npz"), np.load(tmp_path / "whole.npz")
    assert len(resumed.files) == len(straight.files) > 10
    for name in straight.files:
        assert resumed[name].tobytes() == straight[name].tobytes()
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_metrics_arrive_once_in_order_and_evaluations_beside_them():
    step, state = scalar()
    seen = []
    train.fit(
        step,
        state,
        Counting(),
        steps=11,
        log_every=4,
        eval_fn=lambda state: {"param": state.params, "step": state.step},
        eval_every=5,
        on_metrics=lambda n, metrics: seen.append((n, metrics)),
    )
    assert [n for n, _ in seen] == [4, 5, 8, 10, 11]
    for n, metrics in seen:
        assert metrics["batch"] == n
        assert ("eval/param" in metrics) == (n in (5, 10, 11))
        assert metrics.get("eval/step", n) == n
        param_before = 1 - 0.01 * sum(range(n))
        assert metrics["loss"] == pytest.approx(param_before * n, rel=1e-5)
        assert metrics.get("eval/param", param_before - 0.01 * n) == pytest.approx(param_before - 0.01 * n, abs=1e-6)


def test_the_host_runs_ahead_of_the_metrics_but_not_far():
    step, state = scalar()
    data, gaps = Counting(), []
    train.fit(step, state, data, steps=20, on_metrics=lambda n, m: gaps.append(data.position - n))
    assert set(gaps[:-2]) == {2} and gaps[-2:] == [1, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_and_never_saved(bad, tmp_path):
    step, state = scalar()
    data = Counting(lambda n: np.float32(bad if n == 7 else n))
    with pytest.raises(train.NonFiniteError, match=f"the loss of step 7 is {bad}"):
        train.fit(step, state, data, steps=20, checkpoints=tmp_path, checkpoint_every=3)
    with train.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [3, 6]


def test_an_optimizer_that_skips_what_is_not_finite_may_go_on(tmp_path):
    step, state = scalar(optax.apply_if_finite(optax.sgd(0.01), 3))
    data, losses = Counting(lambda n: np.float32(math.nan if n == 4 else n)), []
    state = train.fit(
        step,
        state,
        data,
        steps=6,
        checkpoints=tmp_path,
        on_metrics=lambda n, m: losses.append(m["loss"]),
        stop_at_nonfinite=False,
    )
    assert [math.isfinite(loss) for loss in losses] == [True, True, True, False, True, True]
    assert float(state.params) == pytest.approx(1 - 0.01 * (1 + 2 + 3 + 5 + 6))


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    """The loss is finite, its gradient is not: the square root at zero."""
    tx = optax.sgd(0.1)
    state = train.TrainState.create({"a": jnp.zeros(2), "n": jnp.arange(2)}, tx, key=jax.random.key(0))
    step = train.make_step(lambda p, b, c: (jnp.sum(jnp.sqrt(p["a"])), {}, c.extras), tx)
    with pytest.raises(train.NonFiniteError, match="the parameters are not finite after step 1"):
        train.fit(step, state, Counting(), steps=9, checkpoints=tmp_path, checkpoint_every=1)
    with train.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None


def test_growing_steps_are_one_run(tmp_path):
    step, state = scalar()
    data = Counting()
    for steps in (3, 4, 4, 8):
        state = train.fit(step, state, data, steps=steps, checkpoints=tmp_path)
        assert int(state.step) == data.position == steps
    whole = train.fit(*scalar(), Counting(), steps=8)
    assert_same(state, whole)
    back = train.fit(*scalar(), Counting(), steps=2, checkpoints=tmp_path)  # those steps are taken already
    assert_same(back, whole)


def test_arguments_that_cannot_be_followed(tmp_path):
    step, state = scalar()
    with pytest.raises(TypeError, match=r"batches must have get_state\(\) and set_state\(\)"):
        train.fit(step, state, iter([1.0]), steps=1, checkpoints=tmp_path)
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        train.fit(step, state, iter([1.0]), steps=1, checkpoint_every=0)
    strange = Counting()
    strange.get_state = lambda: b"bytes"
    with pytest.raises(TypeError, match="a data position must be JSON"):
        train.fit(step, state, strange, steps=1, checkpoints=tmp_path)
    with pytest.raises(ValueError, match="the batches ended before step 3 of 5"):
        train.fit(step, state, iter([np.float32(1)] * 2), steps=5)


def test_json_lines_of_a_run_cut_off_are_those_of_one_that_was_not(tmp_path):
    def run(name, stop=None):
        lines = train.JsonLines(tmp_path / name / "metrics.jsonl")

        def on_metrics(n, metrics):
            lines(n, metrics)
            if n == stop:
                raise Killed

        train.fit(
            *scalar(), Counting(), steps=9, checkpoints=tmp_path / name, checkpoint_every=4, on_metrics=on_metrics
        )

    run("straight")
    with pytest.raises(Killed):
        run("cut", stop=6)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # cut in the middle of a line
    run("cut")
    text = (tmp_path / "straight" / "metrics.jsonl").read_text()
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == text
    assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, 10))


def test_json_lines_are_json(tmp_path):
    lines = train.JsonLines(tmp_path / "m.jsonl")
    lines(1, {"a": math.nan, "b": 0.5})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "a": None, "b": 0.5}
