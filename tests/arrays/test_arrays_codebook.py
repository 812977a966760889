"""`Codebook` leaves under the primitives that models use: the dense value's results, by rules."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import lax

from jaxcompress import compressed, pack
from jaxcompress.arrays import Codebook, _tiles, watch


def leaf(*shape: int, k: int = 4, axes: tuple[int, ...] = (), seed: int = 0, keep_zeros: bool = False) -> Codebook:
    first, second = jax.random.split(jax.random.key(seed))
    blocks = [n if axis in axes else 1 for axis, n in enumerate(shape)]
    centroids = jax.random.normal(second, (*blocks, k))
    return Codebook.from_indices(jax.random.randint(first, shape, 0, k), centroids, keep_zeros=keep_zeros)


def dense(w: Codebook) -> np.ndarray:
    """By a loop over the indices."""
    codes, table = np.asarray(w.codes()), np.broadcast_to(w.centroids, (*w.shape, w.centroids.shape[-1]))
    out = np.array([table[(*at, codes[at])] for at in np.ndindex(w.shape)]).reshape(w.shape)
    return np.where(codes == 0, 0, out) if w.keep_zeros else out


@pytest.mark.parametrize("k", [2, 3, 16, 17, 256])
@pytest.mark.parametrize("axes", [(), (1,)])
def test_indices_are_packed(k: int, axes: tuple[int, ...]) -> None:
    w = leaf(5, 7, k=k, axes=axes, keep_zeros=k == 3)
    bits = {2: 1, 3: 2, 16: 4, 17: 8, 256: 8}[k]
    assert w.bits == bits and w.indices.shape == (5, -(-7 * bits // 8))
    np.testing.assert_array_equal(w.materialise(), dense(w))


CASES = {
    "dense": (lambda x, w: x @ w, (3, 6), (6, 8), (1,)),
    "heads": (lambda x, w: jnp.einsum("bk,khd->bhd", x, w), (3, 6), (6, 2, 8), (1,)),
    "backwards": (lambda x, w: x @ w.T, (3, 8), (6, 8), (0,)),
    "reshaped": (lambda x, w: x @ w.reshape(12, 4), (3, 12), (6, 8), ()),
    "convolution": (
        lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (2, 5, 5, 3),
        (3, 3, 3, 8),
        (3,),
    ),
    "looked up": (lambda x, w: w[jnp.array([[0, 2], [5, 1]])] * x[0, 0], (1, 1), (6, 8), ()),
    "bfloat16": (lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), (3, 6), (6, 8), ()),
}


@pytest.mark.parametrize(("case", "one_device"), [*((case, True) for case in CASES), ("dense", False)])
def test_rules(monkeypatch, case: str, one_device: bool) -> None:
    fn, x_shape, w_shape, axes = CASES[case]
    if one_device:
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        monkeypatch.setattr(_tiles, "TILE", 16)
        monkeypatch.setattr(_tiles, "WIDTH", 4)
        monkeypatch.setattr(_tiles, "SMALL", 16)
    x, w = jax.random.normal(jax.random.key(3), x_shape), leaf(*w_shape, axes=axes, keep_zeros=True)
    with watch() as hits:
        got = jax.jit(compressed(fn, strict=True))(x, w)
    assert hits and all(how == "rule" for *_, how in hits)
    tolerance = 2e-2 if case == "bfloat16" else 1e-5
    np.testing.assert_allclose(
        np.asarray(got, np.float32),
        np.asarray(fn(x, jnp.asarray(dense(w))), np.float32),
        rtol=tolerance,
        atol=tolerance,
    )


def test_stacked_layers_pass_through_scan() -> None:
    w, x = leaf(3, 8, 8, axes=(0,)), jnp.ones((2, 8))

    def deep(w: Codebook, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    want = x
    for layer in dense(w):
        want = jnp.tanh(want @ layer)
    np.testing.assert_allclose(jax.jit(compressed(deep))(w, x), want, rtol=1e-5)


def test_saved_and_packed(tmp_path) -> None:
    tree = {"a": leaf(5, 7, k=3, keep_zeros=True), "b": leaf(4, 6, k=200, axes=(1,))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "tree", jax.eval_shape(lambda: tree))
    pack.save(tmp_path / "tree.jxc", tree)
    for other in (restored, pack.load(tmp_path / "tree.jxc")):
        assert jax.tree.structure(other) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, other, tree)


def test_bad_centroids() -> None:
    with pytest.raises(ValueError, match="k from 1 to 256"):
        Codebook.from_indices(jnp.zeros((2, 3), int), jnp.zeros((1, 1, 300)))
    with pytest.raises(ValueError, match="blocks"):
        Codebook.from_indices(jnp.zeros((2, 3), int), jnp.zeros((1, 2, 4)))
    for wrong in (3, 256, -1, 0.5):
        with pytest.raises(ValueError, match="integers from 0 to 2"):
            Codebook.from_indices(jnp.full((2, 3), wrong), jnp.zeros((1, 1, 3)))
