"""The GPU kernels: what the ops are tested for, of every kernel; interpreted where there is no GPU."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_vq
from jax_vq.kernels import (
    hopper_codes,
    quantize,
    sizes,
    tiles,
    vq_before,
    vq_causal,
    vq_states_grad,
    vq_tables,
)
from jax_vq.kernels.vq_states_grad import RowData
from jax_vq.kernels.vq_sums import Sums, before_segments
from jax_vq.ops.implementations import Kernel
from jax_vq.ops.vq_blocks import Keys
from jax_vq.ops.vq_causal import Books
from parity_tests.support import assert_close, assert_gradient_close, to_jax, to_numpy
from parity_tests.vq_calls import attend, differentiable, optional
from vq_common import oracle, vq_oracle
from vq_common.cases import Case, Inputs, case_inputs, cases

KERNELS: dict[str, Any] = {"implementation": "triton"}
ON_GPU = jax.default_backend() == "gpu"
# Forms that kernels run as a whole, at odd sizes; all others share the ops' own tests on a GPU.
CASES = (
    "small_full",
    "small_causal",
    "one_token_causal",
    "more_codes_than_tokens_causal",
    "cross_short_queries",
    "grouped_causal",
)
SHAPE = (1, 256, 2, 128)


@pytest.fixture
def two_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles in a segment, and a segment after another, at a length that one segment would do for."""
    jax.clear_caches()
    monkeypatch.setattr(sizes, "n_segment", lambda length, n_row, tile: 2)
    yield
    jax.clear_caches()


def inputs_of(dtype: str = "bfloat16", **sizes: Any) -> Inputs:
    return case_inputs(Case(name="kernels", **{"batch": 1, "is_causal": True} | sizes), dtype)


def run(inputs: Inputs, dtype: str = "bfloat16", **options: Any) -> np.ndarray:
    return attend("jax", inputs, dtype, **KERNELS, **{"is_causal": True} | options)


@pytest.mark.parametrize("case", [case for case in cases("ci") if case.name in CASES], ids=lambda c: c.name)
def test_kernels_match_the_oracle(case: Case) -> None:
    inputs = case_inputs(case, "bfloat16")
    options = case.options | optional(inputs)
    out, gradients = differentiable("jax", inputs, "bfloat16", **KERNELS, **case.options)(inputs.d_out)
    assert_close(out, vq_oracle.vq_attention(*inputs[:5], **options), "bfloat16")
    targets = vq_oracle.vq_attention_gradients(*inputs[:5], inputs.d_out, **options)
    for found, target in zip(gradients, targets, strict=True):
        if target is not None:
            assert_gradient_close(found, target, "bfloat16")


def test_every_case_is_there() -> None:
    assert set(CASES) <= {case.name for case in cases("ci")}


@pytest.mark.usefixtures("two_segments")
@pytest.mark.parametrize("is_causal", [False, True])
def test_many_codes_and_wide_values(is_causal: bool) -> None:
    """More codes than a chunk, wider values than a block, several tiles: all that is looped over."""
    inputs = inputs_of(q_len=601, n_head=1, n_code_q=150, n_code_k=139, d_v=133, is_causal=is_causal)
    expected = vq_oracle.vq_attention(*inputs[:5], is_causal=is_causal)
    assert_close(run(inputs, is_causal=is_causal), expected, "bfloat16")


@pytest.mark.usefixtures("two_segments")
@pytest.mark.parametrize("is_causal", [False, True])
def test_float32_keeps_its_precision(is_causal: bool) -> None:
    """Three bfloat16 parts of every number: two of them miss by five times the tolerance."""
    inputs = inputs_of("float32", q_len=201, n_head=2, n_kv_head=1, n_code_k=127, d_v=133, has_bias=True)
    expected = vq_oracle.vq_attention(*inputs[:5], is_causal=is_causal, code_bias=inputs.code_bias)
    assert_close(run(inputs, "float32", is_causal=is_causal), expected, "float32")


def test_float32_of_one_token() -> None:
    inputs = inputs_of("float32", q_len=1)
    assert_close(run(inputs, "float32"), inputs.v, "float32")


@pytest.mark.parametrize("n_segment, n_code, width", [(1, 16, 16), (11, 32, 33), (16, 16, 150)])
def test_sums_before_segments_and_modes(n_segment: int, n_code: int, width: int) -> None:
    """Those of plain XLA, with what is not finite in one segment of a key head, and a head of wide scores."""
    rng, shape = np.random.default_rng(0), (2, 2, n_segment, n_code)
    vectors, numbers = rng.normal(size=(*shape, width)), rng.integers(0, 9, shape).astype(float)
    vectors[1, 0, n_segment // 2, n_code - 1, width - 1] = np.nan
    sums = Sums(to_jax(vectors, "float32"), to_jax(numbers, "float32"))
    first = Sums(*(x[:, :, :1] for x in sums))
    before, is_bad = vq_before.before_segments(sums, first)
    for found, expected in zip(before, before_segments(sums, first), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    spread = np.zeros((4, 37), np.float32)
    spread[1, 36], spread[2, 0] = vq_tables.MAX_RANGE + 1, np.nan
    tables = vq_tables.Tables(*(None,) * 3, jnp.asarray(spread))
    expected = np.zeros((2, 4, n_segment), np.int32)
    expected[1, :2, n_segment // 2] = 1
    expected[:, 1:3] = 2
    np.testing.assert_array_equal(vq_before.modes(tables, is_bad), expected)


@pytest.mark.parametrize("n_code, n_padded", [(13, 16), (100, 128), (300, 384)])
def test_padded_codes_make_no_scores_wide(n_code: int, n_padded: int) -> None:
    """Or every call would take the way of wide scores, for the same output."""
    rng = np.random.default_rng(0)
    books = [to_jax(rng.normal(size=(2, n_code, 16)), "float32") for _ in range(2)]
    tables = vq_tables.Tables.of(Books.of(*books, None, 0.25), n_padded, jnp.bfloat16)
    table = np.einsum("hqd,hkd->hqk", *(np.asarray(book, np.float64) for book in books)) / 4
    np.testing.assert_allclose(tables.spread, np.ptp(table, axis=-1), rtol=1e-5)
    assert not tables.is_wide.any()


@pytest.mark.usefixtures("n_tile")
@pytest.mark.parametrize("n_code", [100, 150])
def test_a_codebook_with_nan_gives_codes_all_the_same(n_code: int) -> None:
    """No number beyond the codes, which a table would be read at; what is not traced is refused before."""
    codebook = np.random.default_rng(0).normal(size=(1, n_code, 16))
    codebook[0, :, 3] = np.nan
    arrays = to_jax(np.ones((1, 190, 1, 16)), "bfloat16"), to_jax(codebook, "float32")
    found = np.asarray(quantize.nearest_codes(*arrays))
    assert ((found >= 0) & (found < n_code)).all()


@pytest.mark.usefixtures("two_segments")
def test_blocks_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """States that would take too much memory are further apart: what is between goes key by key."""
    monkeypatch.setattr(sizes, "MAX_STATE_BYTES", 2**14)
    inputs = inputs_of(q_len=601, n_head=1, n_code_q=150, n_code_k=139)
    assert sizes.block_len(256, 601, 2 * inputs.v.shape[3], sizes.MAX_STATE_BYTES) == 256
    assert_close(run(inputs), vq_oracle.vq_attention(*inputs[:5], is_causal=True), "bfloat16")


def test_gradients_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where states of a whole sequence would take too much memory; parts change the rounding alone."""
    rng, shape, n_code, width = np.random.default_rng(0), (1, 256, 2), 256, 16

    def draw(*shape: int, dtype: str = "bfloat16") -> jax.Array:
        return to_jax(rng.uniform(-1, 1, size=shape), dtype)

    codes_q, codes_k = (jnp.asarray(rng.integers(0, 139, shape), jnp.int32) for _ in range(2))
    share, delta = (draw(*shape, dtype="float32") for _ in range(2))
    rows = RowData(codes_q, draw(*shape, width), share, delta)
    keys = Keys(codes_k, draw(*shape, width), None, None)
    first = Sums(*(draw(1, 2, 1, n_code, *last, dtype="float32") for last in ((width,), ())))
    tables = draw(2, n_code, n_code), *(draw(2, n_code, width) for _ in range(2))

    def gradients(*arrays: Any) -> Any:
        return vq_states_grad.block_gradients(*arrays, width)

    whole = jax.jit(gradients)(rows, keys, *tables, first)
    jax.clear_caches()
    monkeypatch.setattr(sizes, "MAX_STATE_BYTES", 2 * 2 * n_code * width * 2)
    assert sizes.part_len(256, 128, sizes.MAX_STATE_BYTES) == 128
    for found, expected in zip(jax.jit(gradients)(rows, keys, *tables, first), whole, strict=True):
        assert_close(found, to_numpy(expected), "bfloat16")


@pytest.mark.usefixtures("two_segments")
@pytest.mark.parametrize(
    "options",
    [
        {"n_head": 2, "has_bias": True},
        {"n_head": 2, "has_bias": True, "n_kv_head": 1, "n_code_q": 200, "n_code_k": 512, "d_v": 33},
        {"n_head": 1, "batch": 2, "n_code_q": 129, "q_len": 1},
    ],
    ids=lambda options: "-".join(f"{name}_{value}" for name, value in options.items()),
)
def test_gradients_over_segments(options: dict[str, Any]) -> None:
    check_gradients(inputs_of(**{"q_len": 301} | options))


def check_gradients(inputs: Inputs) -> None:
    """Outputs and gradients are those of the oracle."""
    out, found = differentiable("jax", inputs, "bfloat16", is_causal=True, **KERNELS)(inputs.d_out)
    options: dict[str, Any] = {"is_causal": True} | optional(inputs)
    assert_close(out, vq_oracle.vq_attention(*inputs[:5], **options), "bfloat16")
    targets = vq_oracle.vq_attention_gradients(*inputs[:5], inputs.d_out, **options)
    for name, target in targets._asdict().items():
        # Everything is seen through codes, so that a bias cancels: its gradient is rounding alone.
        if target is not None and name != "code_bias":
            assert_gradient_close(getattr(found, name), target, "bfloat16")


@pytest.fixture(params=["every vector", "1 tile", "3 tiles", "hopper"])
def n_tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By all bits of the codebook; or by float16 first, with a chunk of codes and some tiles a program."""
    jax.clear_caches()
    if request.param != "every vector":
        monkeypatch.setattr(quantize, "BRIEF", 0)
    if request.param == "hopper":
        if not ON_GPU:
            pytest.skip("Mosaic's kernels run there")
        monkeypatch.setitem(KERNELS, "implementation", None)
    elif request.param != "every vector":
        monkeypatch.setattr(sizes, "n_tile", lambda length, n_row, tile: int(request.param[0]))
    yield
    jax.clear_caches()


def codes_of(x: np.ndarray, codebook: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """Nearest codes; for Mosaic's kernel of whole tiles, and more of the last code, which change nothing."""
    if KERNELS["implementation"] is not None:
        return to_numpy(jax_vq.nearest_codes(to_jax(x, "bfloat16"), to_jax(codebook, dtype), **KERNELS))
    length, width = x.shape[1], x.shape[3]
    x = np.pad(x, ((0, 0), (0, -length % 64), (0, 0), (0, -width % 64)))
    codebook = np.pad(codebook, ((0, 0), (0, 0), (0, -width % 64)))
    codebook = np.pad(codebook, ((0, 0), (0, max(65 - codebook.shape[1], 0)), (0, 0)), mode="edge")
    array = to_jax(x, "bfloat16")
    assert hopper_codes.is_usable(array, -(-codebook.shape[1] // 128) * 128)
    found = to_numpy(jax_vq.nearest_codes(array, to_jax(codebook, dtype)))
    return found[:, :length]


@pytest.mark.usefixtures("n_tile")
@pytest.mark.parametrize("codebook_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_code", [5, 300])
def test_codes_are_the_nearest(n_code: int, codebook_dtype: str) -> None:
    """Those of float64 wherever the two best scores differ by more than float32 rounds."""
    rng = np.random.default_rng(n_code)
    x = np.asarray(jnp.asarray(rng.normal(size=(2, 97, 3, 33)), jnp.bfloat16), np.float64)
    codebook = np.asarray(jnp.asarray(rng.normal(size=(3, n_code, 33)), codebook_dtype), np.float64)
    found = codes_of(x, codebook, codebook_dtype)
    score = np.einsum("bthd,hcd->bthc", x, codebook) - (codebook**2).sum(-1) / 2
    best = np.sort(score, axis=-1)
    is_clear = best[..., -1] - best[..., -2] > 1e-5
    assert is_clear.mean() > 0.99
    np.testing.assert_array_equal(found[is_clear], oracle.nearest_codes(x, codebook)[is_clear])


@pytest.mark.usefixtures("n_tile")
def test_codes_that_differ_in_their_last_bits() -> None:
    """Codes of a sign pattern are one in float16 and in two terms of bfloat16; the third tells them apart."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], size=(10, 16))
    factors = 1 + 2.0**-9 + np.arange(4) * 2.0**-20
    codebook = (signs[:, None] * factors[:, None]).reshape(1, 40, 16).astype(np.float32)
    pattern = rng.integers(0, 10, 200)
    found = codes_of(3 * signs[pattern][None, :, None], codebook)
    np.testing.assert_array_equal(found[0, :, 0], 4 * pattern + 3)


@pytest.mark.usefixtures("n_tile")
@pytest.mark.parametrize("size", [1e-15, 1e-7, 1e4, 1e17])
def test_codes_of_vectors_out_of_the_range_of_float16(size: float) -> None:
    rng = np.random.default_rng(0)
    codebook = np.asarray(size * rng.normal(size=(2, 150, 16)), np.float32)
    x = np.asarray(jnp.asarray(size * rng.normal(size=(1, 190, 2, 16)), jnp.bfloat16), np.float64)
    x[0, ::5] *= 40  # of size 1e4 most are in range, and these are not
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    np.testing.assert_array_equal(codes_of(x, codebook), oracle.nearest_codes(x, codebook.astype(np.float64)))


@pytest.mark.usefixtures("n_tile")
@pytest.mark.parametrize("n_between", [0, 140])  # codes: more than a chunk
def test_codes_that_float16_puts_in_another_order(n_between: int) -> None:
    """Of two codes the better one loses by what float16 makes of the codes, or of tiny vectors."""
    half, step = np.ones(8), 2.0**-10  # between float16 numbers from 1 on
    good = 1 + step * np.r_[0.45 * half, 0.45 * half]  # rounds to 1 each
    bad = 1 + step * np.r_[0.55 * half, 0.3 * half]  # half of it rounds up
    codebook = np.stack([bad, *[-good] * n_between, good, -good])[None].astype(np.float32)
    assert (codes_of(np.full((1, 190, 1, 16), 3.0), codebook) == 1 + n_between).all()
    x = 2.0**-24 * np.r_[93 / 64 * half, 99 / 64 * half[:4], 80 / 64 * half[:4]]  # rounds to 1; 2 and 1 steps
    codebook = np.float32(2.0**-10) * np.stack([np.r_[-half, half], np.r_[half, -half], np.r_[-half, -half]])
    assert (codes_of(np.tile(x, (1, 190, 1, 1)), codebook[None]) == 1).all()


@pytest.mark.usefixtures("n_tile")
def test_codes_that_float16_puts_in_another_order_wherever_they_are() -> None:
    """Such a pair of one thread and another, of one part of its codes and another; a head for each order."""
    half, step = np.ones(8), 2.0**-10  # as above
    good, bad = 1 + step * np.r_[0.45 * half, 0.45 * half], 1 + step * np.r_[0.55 * half, 0.3 * half]
    places = [(3, 3 + n) for n in (1, 2, 8, 16, 56, 64, 72, 128, 129, 192)]
    places += [place[::-1] for place in places]
    codebook = np.tile(-good, (len(places), 300, 1))
    for head, place in enumerate(places):
        codebook[head, list(place)] = good, bad
    found = codes_of(np.full((1, 100, len(places), 16), 3.0), codebook.astype(np.float32))
    np.testing.assert_array_equal(found[0], np.tile([place[0] for place in places], (100, 1)))


@pytest.mark.usefixtures("n_tile")
def test_what_is_not_finite_has_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, codebook = rng.normal(size=(1, 190, 2, 16)), rng.normal(size=(2, 150, 16))
    bad = {(3, 0): np.nan, (70, 1): np.inf, (189, 0): -np.inf}
    for (t, head), value in bad.items():
        x[0, t, head, 5] = value
    finite = Kernel(lambda x, book: quantize.finite_codes((x,), (book,))[0], quantize.why_not)
    monkeypatch.setitem(quantize.KERNELS, "nearest_codes", finite)
    found = codes_of(x, codebook)
    assert {tuple(where[1:]) for where in np.argwhere(found == -1)} == set(bad)


def test_counts_keep_all_their_bits_in_half_types() -> None:
    """Denominators are products with counts: 24 bits of each go through bfloat16."""
    counts = np.random.default_rng(0).integers(0, 2**24, 500).astype(np.float32)
    columns = tiles.in_parts(tiles.as_columns(jnp.asarray(counts)), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(columns, np.float64).sum(1), counts)


def test_float32_is_three_parts() -> None:
    x = np.random.default_rng(0).normal(size=500).astype(np.float32) * 10.0 ** np.arange(-25, 25).repeat(10)
    x = x.astype(np.float32)
    parts = jax.jit(lambda x: tiles.parts_of(x, jnp.float32))(x)
    assert {part.dtype for part in parts} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(sum(np.asarray(part, np.float64) for part in parts), x)


@pytest.mark.usefixtures("n_tile")
def test_equal_codes_take_the_first() -> None:
    rng = np.random.default_rng(0)
    x, third = rng.normal(size=(1, 70, 1, 16)), rng.normal(size=(1, 70, 16))
    assert codes_of(x, np.concatenate([third, third, third], axis=1)).max() < 70


@pytest.mark.usefixtures("two_segments")
@pytest.mark.parametrize("n_code, dtype", [(19, "bfloat16"), (139, "bfloat16"), (19, "float32")])
def test_the_future_changes_nothing(n_code: int, dtype: str) -> None:
    """Any change at t leaves every earlier output exactly as it was, though a NaN takes another loop."""
    inputs = inputs_of(dtype, q_len=421, n_head=1, n_code_k=n_code)
    before = run(inputs, dtype)
    for t, value in ((1, np.nan), (130, np.inf), (130, 3.0), (300, np.nan)):
        changed = inputs._replace(q=inputs.q.copy(), k=inputs.k.copy(), v=inputs.v.copy())
        for x in (changed.q, changed.k, changed.v):
            x[:, t:] = value
        np.testing.assert_array_equal(run(changed, dtype)[:, :t], before[:, :t])


@pytest.mark.usefixtures("two_segments")
@pytest.mark.parametrize(
    "is_causal, n_code, dtype",
    [
        (False, 19, "bfloat16"),
        (True, 19, "bfloat16"),
        (True, 139, "bfloat16"),
        (False, 19, "float32"),
        (True, 19, "float32"),
    ],
)
def test_nonfinite_inputs_reach_the_rows_that_attend_to_them(
    is_causal: bool, n_code: int, dtype: str
) -> None:
    inputs = inputs_of(dtype, q_len=300, batch=2, n_code_k=n_code)
    clean = run(inputs, dtype, is_causal=is_causal)
    t, head = (
        13,
        1,
    )  # rows that attend are in its tile, in the next one of its segment, and in the next segment
    for name, value in (("q", np.nan), ("k", np.inf), ("v", np.nan), ("v", -np.inf)):
        x = getattr(inputs, name).copy()
        x[1, t, head, 2] = value
        out = run(inputs._replace(**{name: x}), dtype, is_causal=is_causal)
        rows = np.zeros(out.shape, bool)
        attending = slice(t, t + 1) if name == "q" else slice(t if is_causal else 0, None)
        rows[1, attending, head, 2 if name == "v" else slice(None)] = True
        assert np.isnan(out[rows]).all()
        np.testing.assert_array_equal(out[~rows], clean[~rows])


@pytest.mark.usefixtures("two_segments")
@pytest.mark.parametrize("is_causal", [False, True])
def test_huge_scores(is_causal: bool) -> None:
    """Gradients too, but of float32: it has log-sum-exps of 1e4 in steps of 1e-3."""
    inputs, options = huge_scores(), {"is_causal": is_causal, "scale": 1.0}
    out, found = differentiable("jax", inputs, "bfloat16", **KERNELS, **options)(inputs.v)
    assert_close(out, vq_oracle.vq_attention(*inputs[:5], **options), "bfloat16")
    targets = vq_oracle.vq_attention_gradients(*inputs[:5], inputs.v, **options)
    assert_gradient_close(found.v, targets.v, "bfloat16")
    out = run(inputs, "float32", **options)
    assert_close(out, vq_oracle.vq_attention(*inputs[:5], **options), "float32")


@pytest.mark.usefixtures("two_segments")
@pytest.mark.parametrize("n_code, n_followed", [(19, 1), (139, 1), (139, 2)])
def test_wide_scores_of_many_blocks(n_code: int, n_followed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights relative to the largest score of a code would underflow; of four blocks, the last is short."""
    monkeypatch.setattr(vq_causal, "N_FOLLOWED", n_followed)
    inputs, scale = inputs_of(q_len=421, n_head=2, n_code_q=n_code, n_code_k=n_code), 40.0
    score = scale * np.einsum("hqd,hkd->hqk", inputs.codebook_q, inputs.codebook_k)
    assert np.ptp(score, axis=2).max() > 2 * vq_tables.MAX_RANGE
    expected = vq_oracle.vq_attention(*inputs[:5], is_causal=True, scale=scale)
    assert_close(run(inputs, scale=scale), expected, "bfloat16")


def huge_scores() -> Inputs:
    """Scores of +-1e4, and codes of huge score that come up first at the very end."""
    rng = np.random.default_rng(0)
    length = 300
    codebook = np.array([[[-100.0, 0.0], [100.0, 0.0], [0.0, 1.0]]])
    picked = np.r_[rng.integers(0, 2, length - 1) * 2, 1]
    q = codebook[0, rng.integers(0, 3, length)][None, :, None]
    k = codebook[0, picked][None, :, None]
    v = np.asarray(jnp.asarray(rng.normal(size=(1, length, 1, 3)), jnp.bfloat16), np.float64)
    return Inputs(q, k, v, codebook, codebook, None, v)


def test_a_sequence_goes_on_from_a_state() -> None:
    inputs = inputs_of(q_len=150)
    arrays = [to_jax(x, "bfloat16") for x in inputs[:5]]
    head, tail = ([x[:, part] for x in arrays[:3]] for part in (slice(70), slice(70, None)))
    _, state = jax_vq.vq_attention(*head, *arrays[3:], is_causal=True, return_state=True, **KERNELS)
    options: dict[str, Any] = {"is_causal": True, "state": state} | KERNELS
    assert jax_vq.why_xla(jax_vq.vq_attention, *tail, *arrays[3:], **options)["causal_attention"] is None
    out = jax_vq.vq_attention(*tail, *arrays[3:], **options)
    assert_close(out, vq_oracle.vq_attention(*inputs[:5], is_causal=True)[:, 70:], "bfloat16")


def test_batched_by_vmap() -> None:
    inputs = inputs_of(batch=2, q_len=65)
    q, k, v, *books = (to_jax(x, "bfloat16") for x in inputs[:5])

    def one(q: Any, k: Any, v: Any) -> Any:
        return jax_vq.vq_attention(q[None], k[None], v[None], *books, is_causal=True, **KERNELS)[0]

    assert_close(jax.vmap(one)(q, k, v), run(inputs), "bfloat16")


def gradient(q: Any, k: Any, v: Any, *books: Any, **options: Any) -> Any:
    out, pull = jax.vjp(lambda *x: jax_vq.vq_attention(*x, *books, **options), q, k, v)
    return pull(out)


def shapes(n_code: int = 128, width: int = 128, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    x = jax.ShapeDtypeStruct((*SHAPE[:3], width), dtype)
    book = jnp.float64 if dtype == jnp.float64 else jnp.float32
    return x, x, x, *(jax.ShapeDtypeStruct((2, n_code, width), book),) * 2


@pytest.mark.parametrize(
    "is_causal, n_code, dtype, brief, n_kernel",
    [
        (False, 128, "bfloat16", quantize.BRIEF, 3),
        (False, 128, "bfloat16", 0, 8),
        (True, 128, "bfloat16", 0, 18),
        (True, 512, "bfloat16", quantize.BRIEF, 12),
        (True, 512, "bfloat16", 0, 19),
        (False, 128, "float32", 0, 2),
        (True, 128, "float32", 0, 5),
    ],
)
def test_kernels_lower_for_a_gpu(
    is_causal: bool, n_code: int, dtype: str, brief: int, n_kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own limits, which interpretation does not have."""
    monkeypatch.setattr(quantize, "BRIEF", brief)
    monkeypatch.setattr(tiles, "is_interpreted", lambda: False)
    if jax.__version_info__ >= (0, 11) and not ON_GPU:
        pytest.skip("this jax lowers for a GPU that is there, or named")
    jax.clear_caches()
    options = {"is_causal": is_causal} | KERNELS
    arrays = shapes(n_code, dtype=jnp.dtype(dtype))
    traced = jax.jit(lambda *x: gradient(*x, **options)).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    jax.clear_caches()
    assert len(re.findall(r"custom_call.*xla\.gpu\.triton", text)) == n_kernel


def test_kernels_have_no_64_bit_types() -> None:
    """With jax_enable_x64, as here, a compiled loop that counts to 64 bits went wrong."""
    found = []

    def step(i: Any, total: Any) -> Any:
        found.append(i.dtype)
        return total + i.astype(jnp.float32)

    def kernel(out_ref: Any) -> None:
        out_ref[...] = tiles.loop(4, step, jnp.zeros((16,)))

    out = tiles.launch(kernel, jax.ShapeDtypeStruct((16,), jnp.float32), (1,), 4, 1)()
    assert jnp.arange(1).dtype == jnp.int64
    assert set(found) == {jnp.dtype("int32")}
    np.testing.assert_array_equal(out, np.full(16, 6.0))


@pytest.mark.parametrize(
    "options, arrays, step, reason",
    [
        ({"mem_len": 128}, shapes(), "causal_gradients", "gradients with an exact window or sinks"),
        ({"mem_len": 128}, shapes(dtype=jnp.float32), "causal_attention", "values of float32"),
        ({}, shapes(dtype=jnp.float32, n_code=256), "causal_attention", "256 key codes with values"),
        ({}, shapes(dtype=jnp.float64), "causal_attention", "values of float64"),
        ({}, shapes(dtype=jnp.float32), "causal_gradients", "gradients of float32"),
        ({}, shapes(dtype=jnp.float32), "finite_codes", "nearest codes of float32"),
        ({}, shapes(width=256), "finite_codes", "width 256"),
        ({}, shapes(n_code=1024), "causal_attention", "1024 key codes"),
        ({}, (*shapes()[:3], shapes(1024)[3], shapes()[4]), "causal_gradients", "gradients of 1024 query"),
        ({"is_causal": False}, shapes(dtype=jnp.float64), "count_keys", "values of float64"),
        ({"is_causal": False}, shapes(dtype=jnp.float64), "full_attention", "values of float64"),
        ({"implementation": "xla"}, shapes(), "causal_attention", "implementation='xla' was asked for"),
    ],
)
def test_what_no_kernel_runs_says_why(options: dict[str, Any], arrays: Any, step: str, reason: str) -> None:
    found = jax_vq.why_xla(gradient, *arrays, **{"is_causal": True} | KERNELS | options)
    assert str(found[step]).startswith(reason)


def test_kernels_run_where_they_are_made_for() -> None:
    """On another device nothing that is not asked for."""
    steps = {"finite_codes", "causal_attention", "causal_gradients"}
    assert jax_vq.why_xla(gradient, *shapes(), is_causal=True, **KERNELS) == dict.fromkeys(steps)
    found = jax_vq.why_xla(gradient, *shapes(), is_causal=True)
    assert found.keys() == steps
    if not ON_GPU:
        assert set(found.values()) == {"Triton compiles for a GPU, and this is a CPU"}


def test_a_compiled_function_tells_too() -> None:
    compiled = jax.jit(lambda *x: jax_vq.vq_attention(*x, is_causal=True, **KERNELS))
    arrays = tuple(jnp.zeros(x.shape, x.dtype) for x in shapes(n_code=16, width=16))
    compiled.lower(*arrays)
    for _ in range(2):
        assert jax_vq.why_xla(compiled, *arrays) == {"finite_codes": None, "causal_attention": None}


def test_what_no_kernel_runs_is_what_xla_runs() -> None:
    inputs = inputs_of(q_len=70)
    plain, asked = (
        attend("jax", inputs, "float64", is_causal=True, implementation=name) for name in ("xla", "triton")
    )
    np.testing.assert_array_equal(plain, asked)


@pytest.mark.parametrize("function", ["vq_attention", "nearest_codes"])
def test_an_implementation_has_a_known_name(function: str) -> None:
    inputs = inputs_of(q_len=70)
    arrays = [to_jax(x, "float32") for x in inputs[:5]]
    arrays = arrays if function == "vq_attention" else [arrays[0], arrays[3]]
    with pytest.raises(ValueError, match="implementation must be None or one of xla, triton, found 'cuda'"):
        getattr(jax_vq, function)(*arrays, implementation="cuda")


WITHOUT_TRITON = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.endswith("pallas.triton") else find(name, *rest)
import jax.numpy as jnp, jax_vq
x, codes = jnp.ones((1, 9, 2, 4), "bfloat16"), jnp.ones((2, 3, 4), "float32")
arguments = x, x, x, codes, codes
assert jax_vq.vq_attention(*arguments, is_causal=True, implementation="triton").shape == x.shape
found = jax_vq.why_xla(jax_vq.vq_attention, *arguments, is_causal=True, implementation="triton")
assert found == {"finite_codes": "there is no kernel", "causal_attention": "there is no kernel"}, found
"""


def test_a_jax_without_triton_runs_plain_xla() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


PLAIN = """
import sys
import jax.numpy as jnp, jax_vq
x, codes = jnp.ones((1, 9, 2, 4), "bfloat16"), jnp.ones((2, 3, 4), "float32")
assert jax_vq.vq_attention(x, x, x, codes, codes, is_causal=True).shape == x.shape
assert "jax.experimental.pallas" not in sys.modules
"""


@pytest.mark.skipif(ON_GPU, reason="kernels run there")
def test_pallas_is_not_imported_where_no_kernel_runs() -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
