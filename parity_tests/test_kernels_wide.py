"""Causal attention over 129 to 512 codes with sums in two groups' registers: where it runs, what it gives."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_vq
from jax_vq.kernels import hopper, hopper_causal_wide, sizes, tiles, vq_causal
from jax_vq.ops import implementations
from jax_vq.ops.vq_blocks import Form
from jax_vq.ops.vq_causal import Books, Queries
from jax_vq.ops.vq_state import empty_state
from parity_tests.support import assert_close, to_jax, to_numpy
from parity_tests.test_kernels_hopper import arguments_of, n_segment, on_gpu  # noqa: F401
from vq_common import vq_oracle
from vq_common.cases import Case, Inputs, case_inputs


@pytest.fixture
def for_short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short sequences and few programs, too."""
    monkeypatch.setattr(hopper_causal_wide, "MIN_SEGMENT", 1)
    monkeypatch.setattr(hopper_causal_wide, "MIN_SHARE", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    "length, n_head, width, n_code, expected",
    [
        (2**18, 16, 128, 512, 2**16),
        (2**18, 16, 64, 512, 2**15),
        (2**18 - 8, 16, 128, 256, 2**16),
        (2**18, 64, 128, 384, 2**18),
        (2**18, 16, 128, 128, 0),
        (2**18, 16, 128, 640, 0),
        (2**18, 16, 256, 512, 0),
        (2**18 - 1, 16, 128, 512, 0),
        (2**18, 40, 128, 512, 0),  # programs for 80 of 132 processors
        (2**18, 80, 128, 512, 0),  # 28 programs after 132
        (2**13, 16, 128, 512, 0),
    ],
)
def test_shapes(
    length: int, n_head: int, width: int, n_code: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "is_interpreted", lambda: False)
    monkeypatch.setattr(hopper, "is_usable", hopper.fits)
    shapes: Any = (1, length, n_head), (1, length, 1, width), (n_head, 100, n_code)
    codes, v, weight = map(jax.ShapeDtypeStruct, shapes, (jnp.int32, jnp.bfloat16, jnp.bfloat16))
    assert hopper_causal_wide.segment_len(codes, v, weight) == expected


@pytest.mark.parametrize(
    "value, spread, is_by_blocks", [(0.0, 1.0, False), (np.nan, 1.0, True), (0.0, 30.0, True)]
)
def test_blocks_run_where_sums_are_not_finite_or_scores_wide(
    value: float, spread: float, is_by_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ones for what the kernel gives, and zeros for blocks."""
    query, keys, tables, first = arguments_of(140, 128, batch=1, spread=spread)
    keys = keys._replace(v=keys.v.at[0, 100, 0, 5].add(value))
    ones = jnp.ones((*query.shape, keys.v.shape[3]), keys.v.dtype), jnp.ones(query.shape, jnp.float32)
    monkeypatch.setattr(hopper_causal_wide, "segment_len", lambda *_: 128)
    monkeypatch.setattr(hopper_causal_wide, "follow", lambda *_: ones)
    taken = []

    def by_blocks(*_: Any, max_bytes: int) -> Any:
        taken.append(max_bytes)
        return *map(jnp.zeros_like, ones), None

    monkeypatch.setattr(vq_causal, "_by_blocks", by_blocks)
    *found, sums = vq_causal._by_two_groups(query, keys, tables, first)
    for x in found:
        np.testing.assert_array_equal(to_numpy(x), np.full(x.shape, float(not is_by_blocks)))
    number = to_numpy(jnp.sum(sums.numbers, axis=(2, 3)))
    assert set(taken) == {sizes.MAX_RARE_BYTES}
    is_here = keys.codes < first.numbers.shape[3]
    np.testing.assert_array_equal(number, to_numpy(jnp.sum(is_here, axis=1)))


@pytest.mark.parametrize("each", [0, 128])
def test_it_is_chosen_where_it_can_run(each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, _, _ = arguments_of(140, 128, batch=1)
    books = Books.of(*(jnp.ones((n, 140, 16)) for n in (4, 2)), None, 0.5)
    state = empty_state(1, (2, 140), (16, 128), keys.v.dtype, 0, 0)
    monkeypatch.setattr(hopper_causal_wide, "segment_len", lambda *_: each)
    calls = []
    for name in ("_by_two_groups", "_by_blocks"):

        def run(*arguments: Any, name: str = name, **_: int) -> Any:
            calls.append(name)
            return None, None, arguments[3]

        monkeypatch.setattr(vq_causal, name, run)
    vq_causal.causal_attention(Queries(None, query, None), keys, books, state, Form(0.5))
    assert calls == ["_by_two_groups" if each else "_by_blocks"]


@on_gpu
@pytest.mark.usefixtures("for_short", "n_segment")
@pytest.mark.parametrize("n_code, length", [(140, 1000), (300, 136), (512, 1032)])
def test_matches_triton(n_code: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and log-sum-exp."""
    arguments = arguments_of(n_code, length)
    assert hopper_causal_wide.segment_len(arguments[0], arguments[1].v, arguments[2].weight)
    results = [vq_causal._by_two_groups(*arguments)[:2]]
    monkeypatch.setattr(hopper, "is_usable", lambda length, width: False)
    results.append(vq_causal._by_blocks(*arguments, max_bytes=sizes.MAX_STATE_BYTES)[:2])
    for found, expected in zip(*results, strict=True):
        found, expected = to_numpy(found), to_numpy(expected)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        assert_close(np.nan_to_num(found), np.nan_to_num(expected), "bfloat16")


def arrays_of(inputs: Inputs) -> list[jax.Array]:
    """q, k and v in bfloat16, and codebooks."""
    return [to_jax(x, "bfloat16" if i < 3 else "float32") for i, x in enumerate(inputs[:5])]


@on_gpu
@pytest.mark.usefixtures("for_short", "n_segment")
@pytest.mark.parametrize("width, n_code", [(64, 256), (128, 512)])
def test_matches_the_oracle(width: int, n_code: int) -> None:
    """Several heads that share keys, and a tile that is cut short."""
    heads, codes = {"n_head": 4, "n_kv_head": 2}, {"n_code_q": n_code, "n_code_k": n_code}
    case = Case(name="wide", batch=2, is_causal=True, q_len=520, d_k=64, d_v=width, **heads, **codes)
    inputs = case_inputs(case, "bfloat16")
    arrays = arrays_of(inputs)
    assert "mosaic_gpu" in implementations.what_runs(jax_vq.vq_attention, *arrays, is_causal=True)
    found = to_numpy(jax_vq.vq_attention(*arrays, is_causal=True))
    assert_close(found, vq_oracle.vq_attention(*inputs[:5], is_causal=True), "bfloat16")


@on_gpu
@pytest.mark.usefixtures("for_short", "n_segment")
def test_calls_are_mapped() -> None:
    """With both sides of the choice, which `jax.vmap` takes."""
    codes = {"n_code_q": 300, "n_code_k": 300}
    case = Case(name="wide", batch=2, is_causal=True, q_len=256, d_k=64, d_v=64, n_head=2, **codes)
    arrays = arrays_of(case_inputs(case, "bfloat16"))

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax_vq.vq_attention(q[None], k[None], v[None], *arrays[3:], is_causal=True)[0]

    together = jax_vq.vq_attention(*arrays, is_causal=True)
    np.testing.assert_array_equal(to_numpy(jax.vmap(call)(*arrays[:3])), to_numpy(together))
