"""A compressed model as one file that runs without its code: a StableHLO program with the weights inside.

    export.save("model.bin", model.apply, small, jax.ShapeDtypeStruct((8, 64), jnp.float32))
    ...
    logits = export.load("model.bin")(images)  # another process: jax, and neither Flax nor the model's code

Weights stay as they are stored: packed codes are bytes of the program, decoded where they are used. `jax.export`
promises to read a program for at least six months. Needs the package `flatbuffers` (the extra `export`).
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import export

from jaxcompress._files import replacing
from jaxcompress.arrays import compressed

__all__ = ["load", "save"]


def save(
    path: str | os.PathLike[str],
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    platforms: Sequence[str] | None = None,
) -> int:
    """Writes `fn(params, *inputs)` as a program of the inputs alone.

    Args:
      path: of the file; it is replaced at once, or not at all.
      fn: a JAX function of parameters and inputs: a Linen module's `apply`, say.
      params: the parameters, compressed leaves among them; concrete.
      *inputs: arrays or `jax.ShapeDtypeStruct`s, in trees of standard containers. A dimension may be symbolic:
        `jax.export.symbolic_shape("batch, 64")` makes a shape whose first length the caller chooses.
      platforms: for which the program is lowered (`("cpu", "tpu")`); the present one by default.

    Returns:
      The file's size in bytes.

    Raises:
      ModuleNotFoundError: `flatbuffers` is not installed.
      TypeError: one string for platforms.
    """
    if isinstance(platforms, str):
        raise TypeError(f"platforms is a tuple of names, such as ({platforms!r},)")
    exported = export.export(jax.jit(lambda *inputs: compressed(fn)(params, *inputs)), platforms=platforms)(*inputs)
    data = exported.serialize()
    with replacing(path) as file:
        file.write(data)
    return len(data)


def load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The program in a file that `save` wrote, as a function of its inputs; it can be jitted, not differentiated.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not an exported program, or is damaged.
    """
    data = Path(path).read_bytes()
    try:
        program = export.deserialize(bytearray(data))
    except Exception as error:  # flatbuffers raises whatever the bytes lead it to
        raise ValueError(
            f"{os.fspath(path)} is not a program that export.save wrote, or is damaged: {error}"
        ) from error
    return program.call
