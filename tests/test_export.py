"""Exported programs: run by a process that has neither Flax nor the model, with their weights as small as they were."""

import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import compressed, export, prune, quantize

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import sys
import numpy as np
from jaxcompress import export
out = export.load(sys.argv[1])(np.load(sys.argv[2]))
assert "flax" not in sys.modules
np.save(sys.argv[3], out)
"""


def model_and_weights() -> tuple[nn.Module, dict]:
    model = nn.Sequential([nn.Dense(96), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
    variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 64)))
    rules = {
        "layers_0/kernel": quantize.Affine(bits=4),
        "layers_2/kernel": quantize.KMeans(4),
        "layers_4/kernel": quantize.Affine(bits=8, activation_bits=8),
    }
    return model, quantize.convert(variables, rules)


def test_another_process_runs_it_with_any_batch(tmp_path: Path) -> None:
    model, small = model_and_weights()
    shape = jax.export.symbolic_shape("batch, 64")
    size = export.save(tmp_path / "model.bin", model.apply, small, jax.ShapeDtypeStruct(shape, jnp.float32))
    x = np.asarray(jax.random.normal(jax.random.key(1), (7, 64)))
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "run.py").write_text(RUN, encoding="utf-8")
    arguments = ["run.py", "model.bin", "x.npy", "out.npy"]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, check=True, timeout=300)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), compressed(model.apply)(small, x), rtol=1e-5, atol=1e-5)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(small))
    assert size == (tmp_path / "model.bin").stat().st_size < stored + 20_000  # the rest is the program
    np.testing.assert_allclose(export.load(tmp_path / "model.bin")(x[:2]), np.load(tmp_path / "out.npy")[:2], rtol=1e-5)


@pytest.mark.slow
def test_sparse_weights_for_two_platforms(tmp_path: Path) -> None:
    params = {"w": jax.random.normal(jax.random.key(0), (16, 8))}
    sparse = prune.to_sparse(params, prune.choose(jax.tree.map(jnp.abs, params), {"w": 0.75}))
    export.save(tmp_path / "m", lambda p, x: x @ p["w"], sparse, jnp.ones((2, 16)), platforms=("cpu", "tpu"))
    np.testing.assert_allclose(
        export.load(tmp_path / "m")(jnp.ones((2, 16))), jnp.ones((2, 16)) @ sparse["w"].materialise(), rtol=1e-5
    )


def test_foreign_and_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a program", encoding="utf-8")
    with pytest.raises(ValueError, match="not a program"):
        export.load(tmp_path / "text")
    export.save(tmp_path / "m", lambda p, x: x * p, jnp.ones(3), jnp.ones(3))
    (tmp_path / "cut").write_bytes((tmp_path / "m").read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged"):
        export.load(tmp_path / "cut")
    with pytest.raises(FileNotFoundError):
        export.load(tmp_path / "nowhere")


def test_nothing_is_left_of_a_save_that_fails(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        export.save(tmp_path / "m", lambda p, x: p @ x, jnp.ones((3, 4)), jnp.ones((5, 6)))
    with pytest.raises(TypeError, match=r"platforms is a tuple of names, such as \('cpu',\)"):
        export.save(tmp_path / "m", lambda p, x: x * p, jnp.ones(3), jnp.ones(3), platforms="cpu")
    assert not list(tmp_path.iterdir())
