"""Nearest codes in one pass: a product with the codebook whose scores never leave the chip."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import sizes
from jax_vq.kernels.tiles import (
    F32,
    columns,
    dot_t,
    launch,
    loop,
    power_of_two,
    read_vectors,
    split,
    tokens,
    why_not_here,
    write_numbers,
)
from jax_vq.ops.implementations import Kernel, add_kernel

N_PART = 3  # bfloat16 terms of a float32 codebook: all of its bits, as float32 products would use


def finite_codes(x: Array, codebook: Array) -> Array:
    """`ops.quantize.finite_codes`: int32 `[B, T, H]`, -1 for a vector with NaN or inf.

    Scores are exact products of x with the codebook in float32, summed in another order than XLA
    sums them: codes are the same where the two best scores differ by more than rounding.
    """
    batch, length, n_head, width = x.shape
    n_code = codebook.shape[1]
    size = sizes.of_codes(length, batch * n_head, n_code)
    chunk = min(power_of_two(n_code), size.chunk)
    n_padded = pl.cdiv(n_code, chunk) * chunk
    padding = (0, 0), (0, n_padded - n_code), (0, power_of_two(width) - width)
    half = jnp.sum(codebook.astype(F32) ** 2, axis=-1) / 2
    half = jnp.pad(half, padding[:2], constant_values=jnp.inf)
    n_part = 1 if codebook.dtype == jnp.bfloat16 else N_PART
    parts = jnp.concatenate(split(jnp.pad(codebook.astype(F32), padding), n_part))
    run = launch(
        partial(_codes_kernel, tile=size.tile, n_tile=size.n_tile, chunk=chunk),
        jax.ShapeDtypeStruct((batch, length, n_head), jnp.int32),
        (pl.cdiv(length, size.tile * size.n_tile), batch * n_head),
        size.n_warp,
        size.n_stage,
    )
    return run(x, parts, half)


def nearest_codes(x: Array, codebook: Array) -> Array:
    """`ops.quantize.nearest_codes`, of checked arguments."""
    return jnp.maximum(finite_codes(x, codebook), 0)


def why_not(asked: str | None, x: Array, codebook: Array) -> str | None:
    """Why `finite_codes` cannot run, or None."""
    if x.dtype != jnp.bfloat16:
        return f"nearest codes of {x.dtype}: the kernel is for bfloat16"
    if x.shape[3] > sizes.MAX_WIDTH:
        return f"width {x.shape[3]}: the kernel is for at most {sizes.MAX_WIDTH}"
    if asked is None and x.shape[0] * x.shape[1] < sizes.MIN_VECTORS:
        return f"{x.shape[0] * x.shape[1]} vectors a head: the kernel is for {sizes.MIN_VECTORS} or more"
    return why_not_here(asked)


def _codes_kernel(
    x_ref: Any, part_ref: Any, half_ref: Any, code_ref: Any, *, tile: int, n_tile: int, chunk: int
) -> None:
    _, length, n_head, width = x_ref.shape
    n_part, (n_code, n_column) = part_ref.shape[0] // n_head, part_ref.shape[1:]
    group, batch, head = pl.program_id(0), pl.program_id(1) // n_head, pl.program_id(1) % n_head
    cols = columns(0, n_column, width)

    def book(c: Any) -> Any:
        at = pl.ds(c * chunk, chunk)
        parts = [plt.load(part_ref.at[p * n_head + head, at, :]) for p in range(n_part)]
        return parts, plt.load(half_ref.at[head, at])

    def best(x: Array, parts: list[Array], half: Array) -> tuple[Array, Array]:
        score = sum((dot_t(x, part) for part in parts[1:]), dot_t(x, parts[0])) - half[None, :]
        return jnp.max(score, axis=1), lax.argmax(score, 1, jnp.int32)

    whole = book(0) if n_code == chunk else None

    def step(i: Any, carry: Any) -> Any:
        rows = tokens((group * n_tile + i) * tile, tile, length)
        x = read_vectors(x_ref, batch, rows, head, cols)
        if whole is not None:
            top, code = best(x, *whole)
        else:

            def more(c: Any, found: Any) -> Any:
                old_top, old = found
                top, code = best(x, *book(c))
                return jnp.maximum(old_top, top), jnp.where(top > old_top, code + c * chunk, old)

            zero = jnp.full((tile,), -jnp.inf, F32), jnp.zeros((tile,), jnp.int32)
            top, code = loop(n_code // chunk, more, zero)

        def finite() -> Array:
            is_finite = jnp.abs(x.astype(F32)) < jnp.inf
            return jnp.where(jnp.min(is_finite.astype(jnp.int32), axis=1) > 0, code, -1)

        is_doubtful = jnp.max((~(jnp.abs(top) < jnp.inf)).astype(jnp.int32)) > 0
        write_numbers(code_ref, batch, rows, head, lax.cond(is_doubtful, finite, lambda: code))
        return carry

    loop(n_tile, step, 0)


add_kernel("finite_codes", Kernel(finite_codes, why_not))
add_kernel("nearest_codes", Kernel(nearest_codes, why_not))
