import json
import math
import os
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


@pytest.fixture(scope="module", params=["one device", "data x model"])
def arranged(request):
    """(step, a function that makes a fresh state, the teacher)."""
    tx = optax.MultiSteps(optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(1e-2, 20)), 2)
    step = train.make_step(loss_fn, tx)
    if request.param == "one device":
        return step, lambda: create(tx), teacher_variables()
    mesh, rules = train.make_mesh(data=4, model=2), [("Dense_0/kernel", P(None, "model"))]
    return step, lambda: train.shard(create(tx), mesh, rules), train.shard(teacher_variables(), mesh)


def test_a_killed_run_resumes_as_if_it_had_not_been(arranged, tmp_path):
    """Parameters, optimizer, batch statistics, dropout keys and data position; in the middle of an accumulation."""
    step, fresh, teacher = arranged
    straight, losses = batches(), {}
    expected = train.fit(
        step, fresh(), straight, steps=20, frozen=teacher, on_metrics=lambda n, m: losses.update({n: m})
    )

    def kill(n, metrics):
        if n == 13:
            raise Killed

    with pytest.raises(Killed):
        train.fit(
            step,
            fresh(),
            batches(),
            steps=20,
            frozen=teacher,
            checkpoints=tmp_path,
            checkpoint_every=11,
            on_metrics=kill,
        )
    again, resumed = {}, batches()
    state = train.fit(
        step,
        fresh(),
        resumed,
        steps=20,
        frozen=teacher,
        checkpoints=tmp_path,
        on_metrics=lambda n, m: again.update({n: m}),
    )
    assert_same(state, expected)
    assert sorted(again) == list(range(12, 21)) and all(again[n] == losses[n] for n in again)
    assert resumed.get_state() == straight.get_state()
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, expected)


def test_a_run_resumes_on_another_mesh(tmp_path):
    tx = optax.sgd(0.1)
    step, teacher = train.make_step(loss_fn, tx), teacher_variables()
    one = train.fit(step, create(tx), batches(), steps=3, frozen=teacher, checkpoints=tmp_path)
    mesh = train.make_mesh(data=2, model=4)
    state = train.shard(create(tx), mesh, [("Dense_0/kernel", P("data", "model"))])
    with train.Checkpoints(tmp_path) as checkpoints:
        moved, _ = checkpoints.restore(state)
    assert_same(moved, one)
    assert moved.params["Dense_0"]["kernel"].sharding.spec == P("data", "model")
    more = train.fit(step, moved, batches(), steps=5, frozen=train.shard(teacher, mesh), checkpoints=tmp_path)
    assert_close(more, train.fit(step, one, batches(), steps=5, frozen=teacher))


WORKER = """
    import os, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    from train_toys import batches, create, loss_fn, teacher_variables
    from jaxcompress import train
    tx = optax.adam(1e-2)
    state = create(tx)
    ballast = jnp.asarray(np.random.default_rng(0).normal(size=(12_000_000,)), jnp.float32)  # makes a save take a while
    state = train.TrainState(state.step, state.params, state.opt_state, {**state.extras, "ballast": ballast}, state.key)
    def loss(params, batch, context):
        stats = {"batch_stats": context.extras["batch_stats"]}
        value, metrics, extras = loss_fn(params, batch, context._replace(extras=stats))
        return value, metrics, {**extras, "ballast": context.extras["ballast"]}
    state = train.fit(train.make_step(loss, tx), state, batches(), steps=int(sys.argv[2]), frozen=teacher_variables(),
                      checkpoints=sys.argv[1], checkpoint_every=4, on_metrics=lambda n, m: print(n, flush=True))
    np.savez(sys.argv[3], *[np.asarray(x) for x in jax.tree.leaves((state.params, state.opt_state, state.extras))])
"""


def worker(*arguments):
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parent), str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path})


def test_a_save_cut_off_by_sigkill_is_ignored(tmp_path):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = worker(cut, 12, tmp_path / "never.npz")
    try:
        deadline = time.monotonic() + 240
        while not (partial := [path for path in cut.glob("8*") if path.name != "8"]):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert partial[0].exists() and not (cut / "8").exists(), "the save ended before the signal came"
        for directory, out in [(cut, "resumed.npz"), (whole, "straight.npz")]:
            process = worker(directory, 12, tmp_path / out)
            assert process.wait(240) == 0
    finally:
        process.kill()
        process.wait()
    assert not partial[0].exists() and (cut / "12").exists()
    resumed, straight = np.load(tmp_path / "resumed.npz"), np.load(tmp_path / "straight.npz")
    assert len(resumed.files) == len(straight.files) > 10
    for name in straight.files:
        assert resumed[name].tobytes() == straight[name].tobytes()


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
