"""Knowledge review: a student's early layers also learn from what its deep layers must become."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress.distill._inputs import feature_pair, keep
from jaxcompress.distill._projectors import Projector, convolve
from jaxcompress.distill._safe import adaptive_pool, mean_square

Shape = tuple[int, int, int]


def review_loss(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """ReviewKD's hierarchical context loss: mean squares of the maps and of their pools, weighted 1, 1/2, 1/4, ...

    Chen et al., "Distilling knowledge via knowledge review", 2021, section 3.3: pools to 4x4, 2x2 and 1x1 where that
    is smaller than the map, and the weighted mean of all. Sum over the stages compared.

    Args:
      student: `[batch, height, width, channels]`, a fused stage.
      teacher: the same shape; constant.
      where: `[batch]`, which examples count.

    Returns:
      One value an example, `[batch]`.
    """
    ours, theirs = feature_pair(student, teacher, where, same_shape=True)
    difference = ours - theirs  # pooling is linear
    total, weight, weights = mean_square(difference), 1.0, 1.0
    for size in (4, 2, 1):
        if size < difference.shape[1]:
            weight /= 2
            pooled = adaptive_pool(difference, (size, min(size, difference.shape[2])))
            total += weight * mean_square(pooled)
            weights += weight
    return keep(total / weights, where)


def review_fusion(student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], channels: int = 64) -> Projector:
    """ReviewKD's residual learning with attention-based fusion: each stage joined with all deeper ones.

    Chen et al., "Distilling knowledge via knowledge review", 2021, sections 3.2 and 3.3. From the deepest stage up: a
    1x1 convolution to `channels`; the deeper stages' fusion, resized to this map, joined by two learned attention maps;
    and a 3x3 convolution to the teacher's channels (here without batch normalisation). Compare with
    `sum(review_loss(s, t) for s, t in zip(fused, teacher_maps))`.

    Args:
      student_shapes: `(height, width, channels)` of each stage, shallow to deep.
      teacher_shapes: likewise of the teacher's; results have these.
      channels: of the fusion.

    Returns:
      A `Projector`: `apply(params, student_maps)` gives one map `[batch, *teacher_shape]` a stage.
    """
    if len(student_shapes) != len(teacher_shapes) or not student_shapes:
        raise ValueError(
            f"student and teacher must have the same stages, got {len(student_shapes)} and {len(teacher_shapes)}"
        )
    last = len(student_shapes) - 1

    def init(key: jax.Array) -> list[dict[str, jax.Array]]:
        params = []
        for i, (ours, theirs) in enumerate(zip(student_shapes, teacher_shapes, strict=True)):
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            stage = {
                "reduce": _kernel(keys[0], 1, ours[2], channels),
                "expand": _kernel(keys[1], 3, channels, theirs[2]),
            }
            if i < last:
                stage["attend"] = _kernel(keys[2], 1, 2 * channels, 2)
            params.append(stage)
        return params

    def apply(params: Any, student_maps: Any) -> Any:
        results: list[jax.Array] = []
        deeper = None
        for i in reversed(range(last + 1)):
            fused = convolve(student_maps[i], params[i]["reduce"])
            if deeper is not None:
                residual = jax.image.resize(deeper, fused.shape, "nearest")
                attention = jax.nn.sigmoid(convolve(jnp.concatenate([fused, residual], -1), params[i]["attend"]))
                fused = fused * attention[..., :1] + residual * attention[..., 1:]
            deeper = fused
            resized = jax.image.resize(fused, (len(fused), *teacher_shapes[i][:2], channels), "nearest")
            results.insert(0, convolve(resized, params[i]["expand"]))
        return results

    return Projector(init, apply)


def _kernel(key: jax.Array, size: int, channels_in: int, channels_out: int) -> jax.Array:
    return jax.random.normal(key, (size, size, channels_in, channels_out)) / math.sqrt(size * size * channels_in)
