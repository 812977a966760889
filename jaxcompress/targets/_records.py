import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxcompress import distill
from jaxcompress.targets._header import Header


def rounding_bound(teacher_logits: ArrayLike, temperature: float = 1.0) -> jax.Array:
    """How far bfloat16 keeping can move an example's soft targets, in the L1 norm; an upper bound, `[...]`.

    With `g_i` a logit's distance to the largest, the kept one is off by at most `2^-8 g_i`, so each probability is
    multiplied by a factor between `exp(-2^-8 g_i / T)` and `exp(2^-8 g_i / T)` and the row scaled to sum 1 again.
    The gradient of `soft_target_loss` on the student's logits, in the L1 norm, moves by at most `T` times this bound;
    `soft_cross_entropy_loss` by at most `T / 2` times this bound times the range of the student's logits.

    Args:
      teacher_logits: `[..., classes]`.
      temperature: above 0.
    """
    z = jnp.asarray(teacher_logits, jnp.float32)
    p = distill.temperature_softmax(z, temperature)
    z = jnp.where(jnp.isneginf(z), jnp.max(z, axis=-1, keepdims=True), z)  # a class ruled out is kept exactly
    gap = jnp.max(z, axis=-1, keepdims=True) - z
    # the sum of largest logit and distance is rounded to float32 once more
    off = (2.0**-8 * gap + 2.0**-23 * jnp.max(jnp.abs(z), axis=-1, keepdims=True)) / temperature
    least, most = (jnp.sum(p * jnp.exp(sign * off), axis=-1, keepdims=True) for sign in (-1, 1))
    up, down = jnp.exp(off) / least - 1, 1 - jnp.exp(-off) / most
    return jnp.sum(p * jnp.maximum(up, down), axis=-1)


def encode(header: Header, logits: jax.Array) -> np.ndarray:
    z = logits.astype(jnp.float32)
    if not bool(jnp.isfinite(jnp.max(z, axis=-1)).all()):  # NaN is the largest of its row
        raise ValueError("the teacher's logits are NaN, or a row's largest is infinite: nothing of this batch was kept")
    out = np.empty(len(z), header.record())
    if header.k is not None:
        few = [distill.top_k_targets(z, header.k, temperature=t) for t in header.temperatures]
        out["indices"] = few[0].indices
        out["log_tail"] = np.stack([each.log_tail for each in few], axis=1)
        z = jnp.take_along_axis(z, few[0].indices, axis=-1)
    if header.dtype == "float32":
        out["logits"] = z
    else:
        largest = jnp.max(z, axis=-1)
        out["largest"] = largest
        out["logits"] = np.asarray((z - largest[..., None]).astype(jnp.bfloat16)).view(np.uint16)
    return out


def decoded_logits(records: np.ndarray) -> np.ndarray:
    if "largest" not in (records.dtype.names or ()):
        return records["logits"].astype(np.float32)
    below = np.ascontiguousarray(records["logits"]).view(jnp.bfloat16).astype(np.float32)
    return records["largest"][..., None].astype(np.float32) + below
