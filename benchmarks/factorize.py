"""What a product with thin factors takes, beside the whole weight's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._harness import Figures, benchmark, faster
from jaxcompress import LowRank, compressed, nbytes

SIZE, RANK, ROWS = 4096, 256, (1, 16, 256)


@benchmark("factorize.product")
def product(rounds: int) -> Figures:
    """Products of 1, 16 and 256 rows with a 4096x4096 weight of rank 256 as two factors, against the float32 weight.

    Eight times fewer multiplications and bytes.
    """
    left, right, whole, x = (
        jax.random.normal(jax.random.key(i), shape) / 64
        for i, shape in enumerate([(SIZE, RANK), (RANK, SIZE), (SIZE, SIZE), (max(ROWS), SIZE)])
    )
    small = LowRank.from_factors(left, right)

    def call(w: Any, rows: int) -> Callable[[], Any]:
        run, inputs = jax.jit(compressed(jnp.dot, strict=True)), x[:rows]
        return lambda: run(inputs, w)

    return {
        str(rows): faster(call(small, rows), call(whole, rows), "float32 product", rounds, weight_bytes=nbytes(small))
        for rows in ROWS
    }
