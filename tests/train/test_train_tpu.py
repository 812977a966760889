"""The step compiled for a described TPU v5e slice, without a TPU: what memory it takes, what travels between chips."""

import math
import os
import re
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compiled import V5E, tpus
from jaxcompress import train

pytest.importorskip("libtpu", reason="compiling for a TPU needs the libtpu wheel: pip install jaxcompress[tpu-compile]")

LAYERS, TX = 2, optax.adam(1e-3)
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}


@pytest.fixture(scope="module")
def chips():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in V5E.items():
            patch.setenv(name, os.environ.get(name, value))
        patch.delenv("XLA_FLAGS", raising=False)  # conftest's are a CPU's: libtpu ends the process when it reads them
        yield tpus()


def forward(layers, x):
    for kernel in layers.values():
        x = jnp.tanh(x.astype(kernel.dtype) @ kernel)
    return x


def loss_fn(params, batch, context):
    target = 0.0 if context.frozen is None else forward(context.frozen, batch).astype(jnp.float32)
    return jnp.mean((forward(params, batch) - target) ** 2), {}, context.extras


class Sizes(NamedTuple):
    width: int
    hidden: int  # of the teacher
    batch: int

    def state(self):
        params = {f"layer{i}": jnp.zeros((self.width, self.width)) for i in range(LAYERS)}
        return train.TrainState.create(params, TX, key=jax.random.key(0))

    def teacher(self):
        shapes = {"layer0": (self.width, self.hidden), "layer1": (self.hidden, self.width)}
        return {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in shapes.items()}


SMALL = Sizes(512, 1024, 2048)
LONG = Sizes(512, 1024, 2**20)  # what a chip keeps of a batch does not fit into its fast memory
LARGE = Sizes(4096, 8192, 32768)  # nor does a layer


def described(make, mesh, rules):
    """What `make` returns, as shapes that lie on the mesh."""
    return jax.jit(make, out_shardings=train.shardings(jax.eval_shape(make), mesh, rules)).eval_shape()


def compiled(chips, sizes, axes, rules=(), teacher_rules=None):
    mesh = train.make_mesh(devices=chips, **axes)
    teacher = None if teacher_rules is None else described(sizes.teacher, mesh, teacher_rules)
    place = NamedSharding(mesh, P("data"))
    batch = jax.ShapeDtypeStruct((sizes.batch, sizes.width), jnp.float32, sharding=place)
    return train.make_step(loss_fn, TX).lower(described(sizes.state, mesh, rules), batch, teacher).compile()


def collectives(program):
    """The bytes that each kind of collective brings to a chip in a step."""
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
    moved = Counter()
    for shapes, kind in re.findall(rf"= (.*?) ({'|'.join(kinds)}|ragged[a-z-]*)(?:-start)?\(", program.as_text()):
        for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
            moved[kind] += BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
    return moved


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [LONG, LARGE], ids=["long", "large"])
def test_data_parallel(sizes, chips):
    """Only the gradient travels; the teacher adds nothing to that, and to memory no more than its layers' outputs."""
    rows, gradient = sizes.batch // 8, LAYERS * sizes.width**2 * 4
    alone = compiled(chips, sizes, {"data": 8})
    under = compiled(chips, sizes, {"data": 8}, teacher_rules=[])
    for program in (alone, under):
        moved = collectives(program)
        assert moved.keys() == {"all-reduce"}
        assert gradient < moved["all-reduce"] <= gradient + 64  # the loss, and perhaps another scalar
        # donated: the new state is written where the old one was
        assert program.memory_analysis().alias_size_in_bytes >= 3 * gradient
    alone_bytes, under_bytes = (program.memory_analysis().temp_size_in_bytes for program in (alone, under))
    student, teacher = (LAYERS + 1) * rows * sizes.width * 4, rows * (sizes.hidden + 2 * sizes.width) * 2
    assert 0 < alone_bytes <= gradient + student
    assert under_bytes <= alone_bytes + teacher


def test_data_and_model_parallel(chips):
    """Columns, then rows, over two chips: no parameter is gathered, and each chip reduces its own part's gradient."""
    rules = [("layer0", P(None, "model")), ("layer1", P("model", None))]
    moved = collectives(compiled(chips, SMALL, {"data": 4, "model": 2}, rules, rules))
    assert moved.keys() == {"all-reduce"}
    gradient, output = LAYERS * SMALL.width**2 * 4 // 2, SMALL.batch // 4 * SMALL.width
    # the gradient's part over `data`; over `model`, the sums of the student's and the teacher's second product
    assert gradient + output * (4 + 2) < moved["all-reduce"] <= gradient + output * (4 + 4) + 64
