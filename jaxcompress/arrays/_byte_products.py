"""Exact products of 8-bit integers on a CPU, by the instruction that multiplies unsigned bytes by signed ones.

x86 adds up 64 products of an unsigned byte with a signed one at a time (AVX-512 VNNI; AMX still more), and XLA:CPU has
kernels for it, but `lax.dot_general` widens operands of two dtypes before XLA sees them. So there is a primitive here
whose StableHLO is that same product, left as it is. Of two signed operands one is moved up by 128, and what that adds
is taken off again: 128 times the sum of the other's codes.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import batching, mlir
from jaxtyping import Array, Int8, Int32, UInt8

from jaxcompress.arrays._bits import signed_part

DEEP = (1 << 31) // (255 * 128)  # contracted weights whose products int32 can add up
TILE = 64  # rows of a weight that are made signed at a time
MANY = 256  # rows of the input; for so many it does better as the left operand, and the weight is made signed whole
UNPACKED = 1 << 20  # codes of a packed weight that are unpacked at a time, so that the product finds them in a cache

PartOf = Callable[[UInt8[Array, "*shape"], int, UInt8[Array, ""]], Int8[Array, "*shape"]]

byte_dot_p = Primitive("byte_dot")


@functools.cache
def multiplies_bytes() -> bool:
    """Whether this machine's CPU has the instruction, and this XLA the kernel; without, it takes 30 times as long."""
    try:
        told = pathlib.Path("/proc/cpuinfo").read_text()
        if not {"avx512_vnni", "amx_int8"} & set(told.split()):
            return False
        u, s = jax.ShapeDtypeStruct((64, 256), jnp.uint8), jax.ShapeDtypeStruct((256, 64), jnp.int8)
        with jax.default_device(jax.devices("cpu")[0]):
            return "ynn" in (byte_dot.lower(u, s, along=0).compile().as_text() or "")
    except (OSError, RuntimeError):  # no such file; no CPU for JAX, or an XLA that can't
        return False


def moved(values: Array) -> Array:
    """int8 codes as unsigned bytes, 128 larger; or such bytes as the codes they were."""
    other = jnp.uint8 if values.dtype == jnp.int8 else jnp.int8
    return lax.bitcast_convert_type(values ^ values.dtype.type(-128 if values.dtype == jnp.int8 else 128), other)


def integer_sums(
    codes: Int8[Array, "groups rows n"], values: Array, along: int, bits: int = 8
) -> list[Int32[Array, "rows columns"]]:
    """The products of each group of rows of codes with a matrix of weights, on a CPU.

    Args:
      codes: of the input.
      values: of the weight; int8, or unsigned bytes that stand for 128 less, or of fewer `bits` packed along the last
        axis. For packed ones, and int8 that is contracted along its first axis, the CPU must be one that
        `multiplies_bytes`.
      along: the axis of `values` that is contracted.
      bits: of a code.
    """
    groups, rows, n = codes.shape
    flat = codes.reshape(-1, n)
    each = [slice(i * rows, (i + 1) * rows) for i in range(groups)]
    if bits < 8:
        sums = packed_sums(flat, values, along, bits, signed_part)
        return [sums[group] for group in each]
    if values.dtype == jnp.uint8 and groups * rows >= MANY:
        values = moved(values)
    if values.dtype == jnp.uint8:
        if not multiplies_bytes():
            columns = _tile_by_tile(flat, values)
            return [columns[:, group].T for group in each]
        # XLA runs the product of a single column another way, slowly
        columns = byte_dot(values, jnp.concatenate([flat, flat]) if groups * rows == 1 else flat, along=along)
        # the sums of codes as a product too, or XLA writes the codes down as int32 for them
        moves = 128 * byte_dot(jnp.ones((2, n), jnp.uint8), flat, along=1)[0]
        return [(columns[:, group] - moves[group]).T for group in each]
    if not multiplies_bytes():
        sums = lax.dot_general(flat, values, (((1,), (along,)), ((), ())), preferred_element_type=jnp.int32)
        return [sums[group] for group in each]
    sums = less_moves(byte_dot(with_ones(flat), values, along=along))
    return [sums[group] for group in each]


def with_ones(codes: Int8[Array, "rows n"]) -> UInt8[Array, "more n"]:
    """The codes as unsigned bytes, 128 larger, and a row of ones, whose product is the sum of a weight's codes."""
    return jnp.concatenate([moved(codes), jnp.ones_like(codes, jnp.uint8, shape=(1, codes.shape[1]))])


def less_moves(sums: Int32[Array, "more k"], zero: Any = 0) -> Int32[Array, "rows k"]:
    """The products of the codes, less a zero point, from those of what `with_ones` makes of the codes."""
    return sums[:-1] - (128 + zero) * sums[-1:]


def packed_sums(
    codes: Int8[Array, "rows n"], packed: UInt8[Array, "a b"], along: int, bits: int, part_of: PartOf
) -> Int32[Array, "rows k"]:
    """The products of rows of codes with a packed matrix of weights, on a CPU that `multiplies_bytes`.

    A tile of outputs' bytes at a time, first with the codes that lie lowest in them, then with the next ones, ...

    Args:
      codes: of the input.
      packed: along the last axis.
      along: the axis of `packed` that is contracted.
      bits: of a code.
      part_of: `(bytes, bits, first) -> int8`, what stands in each byte from a bit on.
    """
    a_byte, inputs = 8 // bits, with_ones(codes)
    depth, outputs = packed.shape[along], packed.shape[1 - along]  # codes, or bytes of them
    at_once = 2 * UNPACKED // a_byte if along else UNPACKED
    width = min(outputs, max(TILE, at_once // depth // TILE * TILE))
    tiles = outputs // width

    def part(start: Any, width: int, i: Any) -> Int32[Array, "rows columns"]:
        tile = lax.dynamic_slice_in_dim(packed, start, width, 1 - along)
        numbers = part_of(tile, bits, jnp.uint8(bits) * jnp.uint8(i))
        return less_moves(byte_dot(inputs[:, i::a_byte] if along else inputs, numbers, along=along))

    def of(start: Any, width: int) -> Int32[Array, "rows columns"]:
        if along:
            return sum((part(start, width, i) for i in range(1, a_byte)), start=part(start, width, 0))
        parts = [part(start, width, i) for i in range(a_byte)]
        # turned, for XLA writes what is stacked along the last axis one number at a time
        return jnp.moveaxis(jnp.stack(parts), 0, -1).reshape(len(codes), -1)

    if along:
        sums = lax.map(lambda i: of(i * width, width), jnp.arange(tiles))
    else:  # a part at a time, so that no two are there at once
        sums = lax.map(lambda at: part(at // a_byte * width, width, at % a_byte), jnp.arange(tiles * a_byte))
        sums = jnp.moveaxis(sums.reshape(tiles, a_byte, len(codes), width), 1, -1)
    sums = jnp.moveaxis(sums.reshape(tiles, len(codes), -1), 0, 1).reshape(len(codes), -1)
    rest = outputs - tiles * width
    return jnp.concatenate([sums, of(tiles * width, rest)], axis=1) if rest else sums


@functools.partial(jax.jit, static_argnames="along")
def byte_dot(u: UInt8[Array, "m n"], s: Array, along: int) -> Int32[Array, "m k"]:
    """The product of unsigned bytes with int8 codes `[n, k]`, or `[k, n]` where `along` is 1; exact."""
    # barriers, or XLA exchanges the operands for a transposition's sake, which leaves it without a kernel
    return lax.optimization_barrier(byte_dot_p.bind(*lax.optimization_barrier((u, s)), along=along))


def _tile_by_tile(codes: Array, values: Array) -> Array:
    rows = math.gcd(values.shape[0], TILE)

    def of_tile(tile: Array) -> Array:
        return lax.dot_general(moved(tile), codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)

    sums = lax.map(of_tile, values.reshape(-1, rows, values.shape[1]))
    return sums.reshape(values.shape[0], codes.shape[0])


@byte_dot_p.def_abstract_eval
def _shape(u: ShapedArray, s: ShapedArray, *, along: int) -> ShapedArray:
    if (u.dtype, s.dtype, u.ndim, s.ndim) != (jnp.uint8, jnp.int8, 2, 2) or u.shape[1] != s.shape[along]:
        raise TypeError(f"byte_dot multiplies uint8 [m, n] by int8 [n, k] or [k, n], got {u} and {s}, along={along}")
    return ShapedArray((u.shape[0], s.shape[1 - along]), jnp.dtype("int32"))


def _lower(ctx: mlir.LoweringRuleContext, u: ir.Value, s: ir.Value, *, along: int) -> Sequence[ir.Value]:
    numbers = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=[],
        rhs_batching_dimensions=[],
        lhs_contracting_dimensions=[1],
        rhs_contracting_dimensions=[along],
    )
    (m, _), columns = u.type.shape, s.type.shape[1 - along]
    out = ir.RankedTensorType.get([m, columns], ir.IntegerType.get_signless(32))
    return [stablehlo.dot_general(out, u, s, numbers)]


mlir.register_lowering(byte_dot_p, _lower)


def _batched(args: tuple[Array, Array], axes: tuple[Any, Any], *, along: int) -> tuple[Array, int]:
    (u, s), (of_u, of_s) = args, axes  # None: not mapped
    if of_s is None:  # more rows
        rows = jnp.moveaxis(u, of_u, 0)
        out = byte_dot(rows.reshape(-1, rows.shape[-1]), s, along=along)
        return out.reshape(*rows.shape[:2], -1), 0
    if of_u is None:  # more columns
        columns = jnp.moveaxis(s, of_s, 1 - along)
        flat = columns.reshape((-1, u.shape[1]) if along else (u.shape[1], -1))
        return byte_dot(u, flat, along=along).reshape(u.shape[0], columns.shape[1 - along], -1), 1
    both = jnp.moveaxis(u, of_u, 0), jnp.moveaxis(s, of_s, 0)
    return lax.map(lambda pair: byte_dot(pair[0], pair[1], along=along), both), 0


batching.primitive_batchers[byte_dot_p] = _batched
