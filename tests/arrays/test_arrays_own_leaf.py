"""A leaf written outside the library, with public names alone: the one in `Leaf`'s docstring."""

import dataclasses
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from leaves import KINDS

from jaxcompress import arrays, export, pack

_EXAMPLE = textwrap.dedent((arrays.Leaf.__doc__ or "").partition("of square blocks:\n")[2])


def test_the_docstrings_leaf_runs_saves_and_exports(rng, tmp_path):
    names = {"jax": jax, "jnp": jnp, "Leaf": arrays.Leaf, "register_product": arrays.register_product}
    exec(_EXAMPLE, names)
    blocks, x = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((3, 4, 4), (5, 12)))
    small, whole = {"kernel": names["Blocks"](blocks)}, np.zeros((12, 12), np.float32)
    for i, block in enumerate(blocks):
        whole[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = block
    np.testing.assert_array_equal(arrays.dense(small)["kernel"], whole)
    assert arrays.nbytes(small) == blocks.nbytes

    def model(params, x):
        return jnp.tanh(x @ params["kernel"]) @ params["kernel"].T

    expected = model({"kernel": whole}, x)
    strict = jax.jit(arrays.compressed(lambda params, x: jnp.tanh(x @ params["kernel"]), strict=True))
    np.testing.assert_allclose(strict(small, x), jnp.tanh(x @ whole), rtol=1e-4, atol=1e-5)
    half = jax.tree.map(lambda b: b.astype("bfloat16"), small)
    assert strict(half, x.astype("bfloat16")).dtype == arrays.dense(half)["kernel"].dtype == jnp.bfloat16
    run = arrays.compressed(model)  # the transpose has no rule: dense
    np.testing.assert_allclose(run(small, x), expected, rtol=1e-4, atol=1e-4)

    arrays.put_off_transposes(names["Blocks"])  # now it has; the product's takes the first axis alone
    with arrays.watch() as hits:
        np.testing.assert_allclose(run(small, x), expected, rtol=1e-4, atol=1e-4)
    met = {("transpose", "rule"): 1, ("dot_general", "rule"): 1, ("dot_general", "dense"): 1}
    assert hits == {("Blocks", *how): n for how, n in met.items()}

    gradient = jax.grad(lambda p: run(p, x).sum())(small)["kernel"].blocks
    of_whole = jax.grad(lambda p: model(p, x).sum())({"kernel": whole})["kernel"]
    np.testing.assert_allclose(gradient[1], of_whole[4:8, 4:8], rtol=1e-4, atol=1e-4)

    stack = names["Blocks"](jnp.stack([blocks, 2 * blocks]))
    scanned = arrays.compressed(lambda w, x: jax.lax.scan(lambda h, w: (h @ w, None), x, w)[0], strict=True)
    np.testing.assert_allclose(scanned(stack, x), 2 * x @ whole @ whole, rtol=1e-4, atol=1e-4)

    pack.save(tmp_path / "small.jxc", small)
    np.testing.assert_array_equal(pack.load(tmp_path / "small.jxc")["kernel"].blocks, blocks)
    export.save(tmp_path / "small.bin", model, small, x)
    np.testing.assert_allclose(export.load(tmp_path / "small.bin")(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_leaf_is_taken_apart_without_python(kind):
    # A compiled function's call does so for each leaf: 1.2 microseconds where it was in Python, 0.25 so.
    tree, called = [KINDS[kind]((8, 4)) for _ in range(3)], []
    structure = jax.tree.structure(tree)
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        structure.flatten_up_to(tree)
        equal = jax.tree_util.default_registry.flatten(tree)[1] == structure
    finally:
        sys.setprofile(None)
    assert equal and not called


def test_leaves_are_frozen_dataclasses_of_their_fields():
    leaf = KINDS["int8"]((8, 4))
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"dataclasses\.replace"):
        leaf.scale = leaf.scale * 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        leaf.other = 1
    assert dataclasses.replace(leaf, activation_bits=8).activation_bits == 8
    with pytest.raises(TypeError, match="hash"):
        hash(leaf)
    with pytest.raises(TypeError, match="classmethod"):

        class Built(arrays.Leaf):
            def __init__(self, x):
                pass
