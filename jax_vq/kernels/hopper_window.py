"""Causal attention with an exact window by Mosaic GPU: `vq_window`, where windows are whole tiles.

Two groups have 64 queries each. A group asks for the scores of a tile of keys together with the sum of the
values of the tile before, and makes weights of the scores while that sum is made.
"""

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper
from jax_vq.kernels import hopper_pieces as pieces
from jax_vq.kernels.hopper_pieces import BLOCK, CHUNK, HALF
from jax_vq.kernels.tiles import BF16, F32
from jax_vq.ops.vq_blocks import Form, Keys
from jax_vq.ops.vq_causal import Queries

MAX_CODES = 512
SINKS = 64  # keys of the tile that sinks are in
N_KEY = 2  # tiles of keys in shared memory
N_VALUE = 3  # tiles of values, or chunks of sums, there
N_REGISTER = 24, 240  # of a thread: that fetches; that multiplies
LOG2_E = math.log2(math.e)


def is_usable(queries: Queries, keys: Keys, weight: Array, form: Form) -> bool:
    """Whether `window_attention` can run."""
    n_code, (_, length, _, width) = weight.shape[2], keys.v.shape
    arrays = queries.q_local, keys.k_local, keys.v, weight
    fits = all(x.dtype == BF16 for x in arrays) and keys.k_local.shape[3] in hopper.WIDTHS
    fits = fits and n_code % CHUNK == 0 and n_code <= MAX_CODES and length >= BLOCK
    fits = fits and form.block_len % BLOCK == form.mem_len % BLOCK == 0
    fits = fits and form.n_sink <= SINKS and form.scale > 0
    return fits and hopper.is_usable(length, width)


def window_attention(
    queries: Queries, keys: Keys, weight: Array, top: Array, states: Any, form: Form
) -> tuple[Array, Array]:
    """`vq_window.window_attention`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length, n_head = queries.codes.shape
    width, local_width, n_code = keys.v.shape[3], keys.k_local.shape[3], weight.shape[2]
    n_program = pieces.n_program(batch * n_head * -(-length // BLOCK))
    arrays = (
        pieces.whole_blocks(queries.codes, 0),
        queries.q_local,
        keys.k_local,
        keys.v,
        pieces.in_order_of_threads(weight).reshape(-1, CHUNK // 2),
        top.reshape(-1),
        states.vectors.reshape(-1, width),
        states.numbers.reshape(-1),
    )
    scratch = (
        hopper.swizzled(BLOCK // HALF, HALF, local_width, dtype=BF16),
        hopper.swizzled(N_KEY, BLOCK, local_width, dtype=BF16),
        hopper.swizzled(N_VALUE, BLOCK, width, dtype=BF16),
        hopper.swizzled(BLOCK // HALF, HALF, width, dtype=BF16),
        plgpu.SMEM((N_VALUE, CHUNK), F32),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=1, num_barriers=N_KEY),
        plgpu.Barrier(num_arrivals=2, num_barriers=N_KEY),
        plgpu.Barrier(num_arrivals=2, num_barriers=N_VALUE),
        plgpu.Barrier(num_arrivals=2, num_barriers=N_VALUE),
    )
    kernel = partial(_kernel, form=form, n_code=n_code, n_state=states.numbers.shape[2])
    shapes = pieces.result_shapes(queries.codes, keys.v)
    out, total, largest = hopper.launch(kernel, shapes, n_program, 3, scratch, by_thread=True)(*arrays)
    return out, pieces.log_sum_exp(total, largest, length)


def _kernel(
    query_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    weight_ref: Any,
    top_ref: Any,
    state_ref: Any,
    count_ref: Any,
    out_ref: Any,
    total_ref: Any,
    largest_ref: Any,
    q: Any,
    key: Any,
    value: Any,
    ready: Any,
    count: Any,
    has_q: Any,
    q_empty: Any,
    has_key: Any,
    key_empty: Any,
    has_value: Any,
    value_empty: Any,
    *,
    form: Form,
    n_code: int,
    n_state: int,
) -> None:
    """Every so many-th tile of queries, by `pieces.items_of`.

    A tile sees its older keys through codes, then the sinks, its own keys, and the window's before them. Keys
    go through slots in turn, and so do values and sums by code; every group counts what has gone through.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    row = plgpu.Layout.WGMMA.reduce(1)
    batch, n_head, n_token = query_ref.shape
    width, n_key_head, n_tile, n_chunk = out_ref.shape[3], k_ref.shape[2], n_token // BLOCK, n_code // CHUNK
    n_query_code, step_len = top_ref.shape[0] // n_head, math.gcd(form.block_len, form.mem_len)
    scale, group = form.scale * LOG2_E, lax.axis_index("group")
    n_own, tile_of = pieces.items_of(batch, n_head, n_tile)

    def place_of(i: Any) -> tuple[Any, Any, Any]:
        """Example, head and first token."""
        example, head, tile = tile_of(i)
        return example, head, tile * BLOCK

    def window_of(token: Any) -> tuple[Any, Any, Any]:
        """The first key of a tile's window, how many tiles are before this one, and 1 if older keys are."""
        start = lax.div(token, form.block_len) * form.block_len - form.mem_len
        first = jnp.maximum(start, 0)
        return first, lax.div(token - first, BLOCK), jnp.where(start > 0, jnp.int32(1), jnp.int32(0))

    @pl.when(group == 0)
    def fetch_all() -> None:
        plgpu.set_max_registers(N_REGISTER[0], action="decrease")

        def fetch_item(i: Any, counts: Any) -> Any:
            example, head, token = place_of(i)
            first, n_earlier, has_older = window_of(token)
            key_head = lax.div(head, n_head // n_key_head)
            state = ((example * n_key_head + key_head) * n_state + lax.div(first, step_len)) * n_code

            def fetch_key(n_key: Any, start: Any, size: int = BLOCK) -> Any:
                slot, at = lax.rem(n_key, N_KEY), pl.ds(start, size)
                plgpu.barrier_wait(key_empty.at[slot])
                to = key.at[slot, pl.ds(0, size)]
                plgpu.copy_gmem_to_smem(k_ref.at[example, at, key_head], to, has_key.at[slot])
                return n_key + 1

            def fetch_value(n_value: Any, start: Any, size: int = BLOCK) -> Any:
                slot, at = lax.rem(n_value, N_VALUE), pl.ds(start, size)
                plgpu.barrier_wait(value_empty.at[slot])
                to = value.at[slot, pl.ds(0, size)]
                plgpu.copy_gmem_to_smem(v_ref.at[example, at, key_head], to, has_value.at[slot])
                plgpu.barrier_arrive(has_value.at[slot])
                return n_value + 1

            def fetch_state(c: Any, n_value: Any) -> Any:
                slot, at = lax.rem(n_value, N_VALUE), pl.ds(state + c * CHUNK, CHUNK)
                plgpu.barrier_wait(value_empty.at[slot])
                plgpu.copy_gmem_to_smem(state_ref.at[at], value.at[slot], has_value.at[slot])
                plgpu.copy_gmem_to_smem(count_ref.at[at], count.at[slot], has_value.at[slot])
                return n_value + 1

            def fetch_both(j: Any, counts: Any) -> Any:
                """The keys of a tile, then the values of the one before: as they are asked for."""
                n_key, n_value = counts
                before = jnp.where(j == 0, token, first + (j - 1) * BLOCK)
                return fetch_key(n_key, first + j * BLOCK), fetch_value(n_value, before)

            n_key, n_value = counts
            plgpu.barrier_wait(q_empty)
            for half in range(BLOCK // HALF):
                at = pl.ds(token + half * HALF, HALF)
                plgpu.copy_gmem_to_smem(q_ref.at[example, at, head], q.at[half], has_q)
            if form.n_sink:
                n_key = lax.fori_loop(0, has_older, lambda _, n: fetch_key(n, 0, SINKS), n_key)
            n_key = fetch_key(n_key, token)
            n_value = lax.fori_loop(0, has_older * n_chunk, fetch_state, n_value)
            if form.n_sink:
                n_value = lax.fori_loop(0, has_older, lambda _, n: fetch_value(n, 0, SINKS), n_value)
            n_key, n_value = lax.fori_loop(0, n_earlier, fetch_both, (n_key, n_value))
            return n_key, fetch_value(n_value, jnp.where(n_earlier == 0, token, token - BLOCK))

        lax.fori_loop(0, n_own, fetch_item, (jnp.int32(0), jnp.int32(0)))

    @pl.when(group > 0)
    def attend_all() -> None:
        plgpu.set_max_registers(N_REGISTER[1], action="increase")
        half = group - 1

        def attend_item(i: Any, carry: Any) -> Any:
            example, head, token = place_of(i)
            _, n_earlier, has_older = window_of(token)
            at = pl.ds(token + half * HALF, HALF)
            code = hopper.load(query_ref.at[example, head, at], row, optimized=False)
            rows = (jnp.maximum(code, 0) + head * n_query_code) * n_chunk  # of `E`, in chunks
            largest = pieces.pick()(top_ref, lax.div(rows, n_chunk)) * LOG2_E

            def attend(out: Any) -> Any:
                def far(c: Any, carry: Any) -> Any:
                    weight, total, n_value = carry
                    slot = lax.rem(n_value, N_VALUE)
                    plgpu.barrier_wait(has_value.at[slot])
                    plgpu.wgmma(out, weight, value.at[slot])
                    more = pieces.gather(0)(weight_ref, rows + jnp.minimum(c + 1, n_chunk - 1))
                    total += pieces.far_sum()(weight, count.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(value_empty.at[slot])
                    return more, total, n_value + 1

                def exact(carry: Any, before: Any = None, limit: Any = None, size: int = BLOCK) -> Any:
                    """Weights of a tile of keys, while those of the one before meet its values.

                    A score that is not finite comes of a query or a key that is not: the total is then NaN.
                    """
                    total, top, n_key, n_value = carry
                    key_slot, slot = lax.rem(n_key, N_KEY), lax.rem(n_value, N_VALUE)
                    n_before = 0 if before is None else 1

                    def weigh(score: Any) -> Any:
                        plgpu.barrier_wait(has_key.at[key_slot])
                        plgpu.wgmma(score, q.at[half], hopper.transposed(key.at[key_slot, pl.ds(0, size)]))
                        if before is not None:
                            plgpu.wgmma(out, before, value.at[slot])
                        found = plgpu.wgmma_accumulator_load(score, wait_n=n_before)
                        plgpu.barrier_arrive(key_empty.at[key_slot])
                        if limit is not None:
                            found = pieces.limited(size)(found, limit)
                        new = jnp.maximum(top, jnp.max(found, axis=1) * scale)
                        weight = jnp.exp2(found * scale - lax.broadcast_in_dim(new, found.shape, [0]))
                        old = jnp.exp2(top - new)
                        part = jnp.sum(weight + 0 * found if limit is None else weight, axis=1)
                        # A branch: what comes before it does not start after it.
                        plgpu.barrier_wait(has_value.at[lax.rem(n_value + n_before, N_VALUE)])
                        if before is not None:
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(value_empty.at[slot])
                        out[...] = out[...] * lax.broadcast_in_dim(old, (HALF, width), [0])
                        return weight.astype(BF16), total * old + part, new

                    weight, total, top = pl.run_scoped(weigh, plgpu.ACC((HALF, size), F32))
                    return weight, (total, top, n_key + 1, n_value + n_before)

                def add(weight: Array, carry: Any, size: int = BLOCK) -> Any:
                    """Values of a tile that nothing follows."""
                    total, top, n_key, n_value = carry
                    slot = lax.rem(n_value, N_VALUE)
                    plgpu.wgmma(out, weight, value.at[slot, pl.ds(0, size)])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(value_empty.at[slot])
                    return total, top, n_key, n_value + 1

                def sinks(_: Any, carry: Any) -> Any:
                    limit = hopper.filled((HALF,), form.n_sink, jnp.int32, row)
                    weight, carry = exact(carry, limit=limit, size=SINKS)
                    return add(weight, carry, SINKS)

                n_key, n_value = carry
                weight = pieces.gather(0)(weight_ref, rows)
                start = weight, hopper.filled((HALF,), 0, F32, row), n_value
                _, total, n_value = lax.fori_loop(0, has_older * n_chunk, far, start)
                plgpu.barrier_wait(has_q)
                state = total, jnp.where(total > 0, largest, -jnp.inf), n_key, n_value
                if form.n_sink:
                    state = lax.fori_loop(0, has_older, sinks, state)
                own = plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=row)
                weight, state = exact(state, limit=own + (half * HALF + 1))
                weight, state = lax.fori_loop(0, n_earlier, lambda _, x: exact(x[1], x[0]), (weight, state))
                plgpu.barrier_arrive(q_empty)
                state = add(weight, state)
                return out[...], *state

            result, total, top, n_key, n_value = pl.run_scoped(attend, plgpu.ACC((HALF, width), F32))
            total = pieces.prepare_rows(ready.at[half], code, result, total)
            total_ref[example, head, at] = total
            largest_ref[example, head, at] = top * (1 / LOG2_E)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ready.at[half], out_ref.at[example, at, head])
            return n_key, n_value

        plgpu.barrier_arrive(q_empty)
        for slot in range(N_KEY):
            plgpu.barrier_arrive(key_empty.at[slot])
        for slot in range(N_VALUE):
            plgpu.barrier_arrive(value_empty.at[slot])
        lax.fori_loop(0, n_own, attend_item, (jnp.int32(0), jnp.int32(0)))
        plgpu.wait_smem_to_gmem(0)
