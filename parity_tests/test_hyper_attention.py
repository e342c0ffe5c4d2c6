"""HyperAttention: both backends against the oracle and each other, and the properties it promises."""

import dataclasses
import functools
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from jax_vq.ops import hyper_attention as jax_ops
from parity_tests.support import equations, to_jax, to_numpy, to_torch
from torch_ref.ops import hyper_attention as torch_ops
from vq_common import oracle
from vq_common.cases import Case, Inputs, case_inputs, round_to
from vq_common.tolerances import TOLERANCES, relative_rms

BACKENDS = ("jax", "torch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperCase(Case):
    """A case with the sizes of HyperAttention; the code counts of `Case` are not used."""

    n_projection: int = 4
    n_sample: int = 5
    block_size: int = 8
    min_seq_len: int = 8
    score_bytes: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"is_causal": self.is_causal, "block_size": self.block_size, "min_seq_len": self.min_seq_len}


CASES = (
    HyperCase(name="full_padded", batch=3, q_len=61, is_padded=True),
    HyperCase(name="cross_padded", batch=3, q_len=37, k_len=53, is_padded=True, n_sample=7),
    HyperCase(name="cross_long_queries", q_len=101, k_len=23, n_head=1, n_projection=1, block_size=4),
    HyperCase(name="more_blocks_than_queries", q_len=3, k_len=47, block_size=5),
    HyperCase(name="one_token_full", q_len=1, n_head=2, n_sample=3),
    HyperCase(name="block_over_length", q_len=29, k_len=31, block_size=100, is_padded=True),
    HyperCase(name="no_samples_full", q_len=41, n_sample=0, is_padded=True),
    HyperCase(name="one_token_causal", q_len=1, is_causal=True),
    HyperCase(name="depth_0", q_len=61, min_seq_len=61, is_causal=True, is_padded=True),
    HyperCase(name="depth_1", q_len=61, min_seq_len=31, is_causal=True, is_padded=True, block_size=9),
    HyperCase(name="depth_3", batch=3, q_len=33, is_causal=True, is_padded=True, block_size=5),
    HyperCase(name="no_samples_causal", q_len=3, min_seq_len=2, is_causal=True, n_sample=0, block_size=99),
)
BY_NAME = {case.name: case for case in CASES}
RUNS = [(case, "float64") for case in CASES] + [
    (BY_NAME[name], dtype) for name in ("cross_padded", "depth_1") for dtype in ("float32", "bfloat16")
]


class Draws(NamedTuple):
    directions: NDArray[np.float64]  # [H, P, D]
    sample_ids: NDArray[np.int32]  # [B, R, N, H]


@functools.cache
def inputs(case: HyperCase, dtype: str) -> tuple[Inputs, Draws]:
    """Inputs that `dtype` holds exactly, with no hash bit of the case under rounding."""
    x = case_inputs(case, dtype)
    rng = np.random.default_rng(1)
    directions = round_to(rng.normal(size=(case.n_head, case.n_projection, case.d_k)), dtype)
    for vectors in (x.q, x.k):
        product = np.einsum("bthd,hpd->bthp", vectors, directions)
        terms = np.einsum("bthd,hpd->bthp", np.abs(vectors), np.abs(directions))
        eps = np.finfo(np.float64 if dtype == "float64" else np.float32).eps
        assert np.all(np.abs(product) > 2 * case.d_k * eps * terms)
    return x, Draws(directions, draw(rng, case, case.batch))


def draw(rng: np.random.Generator, case: HyperCase, batch: int) -> NDArray[np.int32]:
    sizes = jax_ops.sample_set_sizes(case.length, case.is_causal, case.min_seq_len)
    shape = (batch, case.n_sample, case.n_head)
    ids = [rng.integers(size, size=shape, dtype=np.int32) for size in sizes]
    return np.stack(ids, 1) if ids else np.zeros((batch, 0, *shape[1:]), np.int32)


@functools.cache
def expected(case: HyperCase, dtype: str) -> tuple[oracle.Attention, oracle.Gradients]:
    x, draws = inputs(case, dtype)
    weight = oracle.hyper_weight(x.q, x.k, *draws, mask=x.mask, **case.settings)
    scale = case.d_k**-0.5
    return (
        oracle.softmax_attention(x.q, x.k, x.v, weight, scale),
        oracle.softmax_attention_gradients(x.q, x.k, x.v, weight, scale, x.d_out),
    )


class Result(NamedTuple):
    out: NDArray[np.float64]
    lse: NDArray[np.float64]
    gradients: oracle.Gradients
    dtypes: tuple[str, str]


@functools.cache
def result(backend: str, device: torch.device, case: HyperCase, dtype: str) -> Result:
    x, draws = inputs(case, dtype)
    return run(backend, device, x, draws, case, dtype)


def run(backend: str, device: torch.device, x: Inputs, draws: Draws, case: HyperCase, dtype: str) -> Result:
    """The op of a backend: out, lse and gradients of `sum(d_out * out)`."""
    arrays = (x.q, x.k, x.v, draws.directions, draws.sample_ids, x.mask, x.d_out)
    if backend == "jax":
        out, lse, gradients = _run_jax(*(to_jax(a, dtype) for a in arrays), case)
    else:
        q, k, v, directions, ids, mask, d_out = (to_torch(a, dtype, device) for a in arrays)
        qkv = tuple(a.requires_grad_() for a in (q, k, v))
        out, lse = torch_ops.hyper_attention(
            *qkv, directions, ids, mask=mask, return_lse=True, **case.settings
        )
        gradients = torch.autograd.grad(out, qkv, d_out)
    dtypes = str(out.dtype).removeprefix("torch."), str(lse.dtype).removeprefix("torch.")
    return Result(to_numpy(out), to_numpy(lse), oracle.Gradients(*map(to_numpy, gradients)), dtypes)


@functools.partial(jax.jit, static_argnums=7)
def _run_jax(
    q: Any, k: Any, v: Any, directions: Any, ids: Any, mask: Any, d_out: Any, case: HyperCase
) -> Any:
    attend = functools.partial(
        jax_ops.hyper_attention,
        directions=directions,
        sample_ids=ids,
        mask=mask,
        return_lse=True,
        **case.settings,
    )
    (out, lse), vjp = jax.vjp(attend, q, k, v)
    return out, lse, vjp((d_out, jnp.zeros_like(lse)))


def assert_close(actual: Result, out: Any, lse: Any, gradients: oracle.Gradients, dtype: str) -> None:
    tolerance = TOLERANCES[dtype]
    assert relative_rms(actual.out, out) <= tolerance.forward
    np.testing.assert_array_equal(np.isneginf(actual.lse), np.isneginf(lse))
    seen = np.isfinite(lse)
    assert relative_rms(actual.lse[seen], lse[seen]) <= tolerance.forward
    for name in oracle.Gradients._fields:
        error = relative_rms(getattr(actual.gradients, name), getattr(gradients, name))
        assert error <= tolerance.gradient, f"gradient of {name}: {error:.1e}"


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_run = pytest.mark.parametrize("case, dtype", RUNS, ids=[f"{case.name}-{dtype}" for case, dtype in RUNS])


@each_backend
@each_run
def test_equals_the_oracle(case: HyperCase, dtype: str, backend: str, torch_device: torch.device) -> None:
    actual = result(backend, torch_device, case, dtype)
    assert actual.dtypes == (dtype, "float64" if dtype == "float64" else "float32")
    attention, gradients = expected(case, dtype)
    assert_close(actual, *attention, gradients, dtype)


@each_run
def test_backends_agree(case: HyperCase, dtype: str, torch_device: torch.device) -> None:
    first, second = (result(backend, torch_device, case, dtype) for backend in BACKENDS)
    assert_close(first, second.out, second.lse, second.gradients, dtype)


def test_a_query_without_keys_gives_0() -> None:
    for name in ("full_padded", "cross_padded", "depth_3"):
        attention, _ = expected(BY_NAME[name], "float64")
        assert np.all(np.isneginf(attention.lse[1]))
        assert np.all(attention.out[1] == 0)


@pytest.mark.float64
@each_backend
@pytest.mark.parametrize("name", ["block_over_length", "one_token_full", "one_token_causal", "depth_0"])
def test_is_exact_with_one_block(name: str, backend: str, torch_device: torch.device) -> None:
    case = BY_NAME[name]
    assert case.block_size >= case.length or (case.is_causal and case.min_seq_len >= case.q_len)
    actual = result(backend, torch_device, case, "float64")
    x, _ = inputs(case, "float64")
    exact = oracle.dot_product_attention(x.q, x.k, x.v, is_causal=case.is_causal, mask=x.mask)
    assert relative_rms(actual.out, exact.out) <= TOLERANCES["float64"].forward


@pytest.mark.float64
@each_backend
@pytest.mark.parametrize(
    "name, score_bytes",
    [("cross_padded", 10_100), ("full_padded", 5000), ("block_over_length", 3000), ("depth_0", 30_000)],
)
def test_chunks_change_nothing(
    name: str, score_bytes: int, backend: str, torch_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of pieces, of blocks, of rows, and of exact pieces."""
    for ops in (jax_ops, torch_ops):
        monkeypatch.setattr(ops, "SCORE_BYTES", score_bytes)
    jax_ops._hyper_attention.clear_cache()  # type: ignore[attr-defined]
    case = dataclasses.replace(BY_NAME[name], score_bytes=score_bytes)
    actual = run(backend, torch_device, *inputs(case, "float64"), case, "float64")
    jax_ops._hyper_attention.clear_cache()  # type: ignore[attr-defined]
    attention, gradients = expected(case, "float64")
    assert_close(actual, *attention, gradients, "float64")


@pytest.mark.parametrize("ops", [jax_ops, torch_ops])
def test_chunks_hold_few_scores_at_any_length(ops: Any) -> None:
    for length in (1, 1000, 4096, 2**18, 2**22 + 1):
        for pieces, block_size in ((1, 1), (16, 256), (2**12, 256), (3, 2**20)):
            n_block = -(-length // block_size)
            rows, keys = -(-length // n_block), min(block_size, length) + 256
            sizes = ops.chunk_sizes(pieces, n_block, rows, keys, 4)
            assert 1 <= sizes.pieces <= pieces
            assert 1 <= sizes.blocks <= n_block
            assert 1 <= sizes.rows <= rows
            assert sizes.pieces * sizes.blocks * sizes.rows * keys * 4 <= ops.SCORE_BYTES
            assert sizes.pieces == 1 or sizes.blocks == n_block
            assert sizes.blocks == 1 or sizes.rows == rows


def test_jax_temporaries_grow_no_faster_than_the_length() -> None:
    def temporaries(length: int) -> int:
        q = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        directions = jax.ShapeDtypeStruct((1, 7, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, 1, 256, 1), jnp.int32)
        compiled = jax.jit(jax_ops.hyper_attention).lower(q, q, q, directions, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(2**17), temporaries(2**20)
    assert long <= 8 * short


def test_jax_traces_one_graph_for_each_level() -> None:
    depth = 4
    q = jax.ShapeDtypeStruct((1, 16 * 2**depth, 1, 3), jnp.float32)
    directions = jax.ShapeDtypeStruct((1, 2, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 2**depth - 1, 4, 1), jnp.int32)
    attend = functools.partial(jax_ops.hyper_attention, is_causal=True, block_size=8, min_seq_len=16)
    jaxpr = jax.make_jaxpr(attend)(q, q, q, directions, ids).jaxpr
    n_hash, n_attention = 2, 2 * (depth + 1)
    assert len(equations(jaxpr, "dot_general")) == n_hash + n_attention


@pytest.mark.float64
@each_backend
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("t", [1, 9, 19, 20, 27, 32])
def test_a_later_key_or_value_changes_no_earlier_output(
    name: str, t: int, backend: str, torch_device: torch.device
) -> None:
    case = BY_NAME["depth_3"]
    before = result(backend, torch_device, case, "float64").out
    x, draws = inputs(case, "float64")
    changed = getattr(x, name).copy()
    changed[:, t] = 3 - 2 * changed[:, t]
    after = run(backend, torch_device, x._replace(**{name: changed}), draws, case, "float64").out
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert x.mask is not None
    np.testing.assert_array_equal(np.any(after[:, t] != before[:, t], axis=(1, 2)), x.mask[:, t])


@pytest.mark.float64
@each_backend
def test_a_query_in_its_bin_changes_its_own_output_only(backend: str, torch_device: torch.device) -> None:
    case, t = BY_NAME["depth_3"], 27
    before = result(backend, torch_device, case, "float64").out
    x, draws = inputs(case, "float64")
    q = x.q.copy()
    q[:, t] *= 2
    after = run(backend, torch_device, x._replace(q=q), draws, case, "float64").out
    np.testing.assert_array_equal(np.delete(after, t, 1), np.delete(before, t, 1))
    assert np.any(after[:, t] != before[:, t])


@pytest.mark.float64
@each_backend
@pytest.mark.parametrize("t, first", [(27, 20), (17, 10)])
def test_a_query_that_changes_bins_moves_only_its_right_halves(
    t: int, first: int, backend: str, torch_device: torch.device
) -> None:
    """The limit that the docstring states: other rows move, but none before the half of `t` starts."""
    case = BY_NAME["depth_3"]
    before = result(backend, torch_device, case, "float64").out
    x, draws = inputs(case, "float64")
    q = x.q.copy()
    q[:, t] *= -1
    after = run(backend, torch_device, x._replace(q=q), draws, case, "float64").out
    np.testing.assert_array_equal(after[:, :first], before[:, :first])
    assert np.any(after[:, first:t] != before[:, first:t])


@pytest.mark.float64
@each_backend
@pytest.mark.parametrize("name", ["full_padded", "cross_padded", "depth_3"])
def test_nan_of_a_padded_key_enters_nothing(name: str, backend: str, torch_device: torch.device) -> None:
    case = BY_NAME[name]
    before = result(backend, torch_device, case, "float64")
    x, draws = inputs(case, "float64")
    assert x.mask is not None
    k, v = x.k.copy(), x.v.copy()
    k[~x.mask], v[~x.mask] = np.nan, np.nan
    after = run(backend, torch_device, x._replace(k=k, v=v), draws, case, "float64")
    np.testing.assert_array_equal(after.out, before.out)
    np.testing.assert_array_equal(after.lse, before.lse)
    for gradient, clean in zip(after.gradients, before.gradients, strict=True):
        np.testing.assert_array_equal(gradient, clean)


@pytest.mark.float64
@each_backend
@pytest.mark.parametrize("name", ["full_padded", "depth_3"])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_nan_stays_in_the_rows_that_attend_to_it(
    name: str, part: str, backend: str, torch_device: torch.device
) -> None:
    case = BY_NAME[name]
    x, draws = inputs(case, "float64")
    assert x.mask is not None
    t = np.flatnonzero(x.mask[-1])[12]
    bad = getattr(x, part).copy()
    bad[-1, t, 1] = np.nan
    x = x._replace(**{part: bad})
    actual = run(backend, torch_device, x, draws, case, "float64").out
    weight = oracle.hyper_weight(x.q, x.k, *draws, mask=x.mask, **case.settings)
    touched = np.zeros(actual.shape[:3], bool)
    touched[-1, :, 1] = np.arange(case.q_len) == t if part == "q" else weight[-1, 1, :, t] > 0
    assert 0 < touched.sum() < case.q_len
    np.testing.assert_array_equal(np.isnan(actual), touched[..., None] & np.ones(actual.shape, bool))


@pytest.mark.float64
@each_backend
@pytest.mark.parametrize("name", ["full_padded", "depth_3"])
def test_huge_scores_are_finite_and_right(name: str, backend: str, torch_device: torch.device) -> None:
    """Integer scores up to 1e4, so that they are exact and only the softmax can err."""
    case = BY_NAME[name]
    x, draws = inputs(case, "float64")
    x = x._replace(q=np.sign(x.q) * 30, k=np.round(x.k) * 30)
    actual = run(backend, torch_device, x, draws, dataclasses.replace(case, d_k=11), "float64")
    attention = oracle.hyper_attention(x.q, x.k, x.v, *draws, mask=x.mask, **case.settings)
    assert np.abs(attention.lse[np.isfinite(attention.lse)]).max() > 1e3
    assert all(np.all(np.isfinite(gradient)) for gradient in actual.gradients)
    assert relative_rms(actual.out, attention.out) <= TOLERANCES["float64"].forward


@pytest.mark.float64
@each_backend
@pytest.mark.parametrize("is_causal", [False, True])
def test_row_sums_are_unbiased_over_samples(
    is_causal: bool, backend: str, torch_device: torch.device
) -> None:
    """Mean over 4,000 draws of `exp(lse)` against exact attention, with chance 1e-6 to fail by luck.

    The draws are the batch. The bound on the z-scores is two-sided, Bonferroni over the rows.
    """
    n_draw = 4_000
    case = HyperCase(name="unbiased", q_len=13, batch=1, n_head=2, d_k=3, d_v=1, n_sample=3)
    case = dataclasses.replace(case, block_size=2, min_seq_len=4, is_causal=is_causal)
    x, draws = inputs(case, "float64")
    q, k, v = (np.broadcast_to(a, (n_draw, *a.shape[1:])) for a in (x.q, x.k, x.v))
    ids = draw(np.random.default_rng(2), case, n_draw)
    mask = np.ones((n_draw, case.q_len), bool)
    mask[:, 5] = False
    ops, array = (jax_ops, to_jax) if backend == "jax" else (torch_ops, to_torch)
    arrays = [array(a, "float64") for a in (q, k, v, draws.directions, ids, mask)]
    _, lse = ops.hyper_attention(*arrays[:5], mask=arrays[5], return_lse=True, **case.settings)
    total = np.exp(to_numpy(lse))
    exact = np.exp(oracle.dot_product_attention(x.q, x.k, x.v, is_causal=is_causal, mask=mask[:1]).lse[0])
    error, spread = total.mean(0) - exact, total.std(0, ddof=1)
    is_sampled = spread > 1e-12 * exact
    assert is_sampled.mean() > 0.5
    assert np.all(np.abs(error[~is_sampled]) <= 1e-12 * exact[~is_sampled])
    z = error[is_sampled] / spread[is_sampled] * n_draw**0.5
    assert np.abs(z).max() <= NormalDist().inv_cdf(1 - 1e-6 / (2 * z.size))


@pytest.mark.parametrize("ops", [jax_ops, torch_ops])
def test_sample_sets(ops: Any) -> None:
    assert ops.sample_set_sizes(61, False, 8) == (61,)
    assert ops.sample_set_sizes(61, True, 8) == (32, 16, 16, 8, 8, 8, 8)
    assert ops.sample_set_sizes(9, True, 3) == (6, 3, 3)
    for length in (1, 2, 7, 8, 9, 61, 1000):
        for min_seq_len in (1, 3, 8, 1000):
            depth = oracle.hyper_depth(length, min_seq_len)
            assert ops.n_sample_sets(length, True, min_seq_len) == 2**depth - 1
            assert ops.n_sample_sets(length, False, min_seq_len) == 1
    assert ops.n_sample_sets(8, True, 8) == 0
    with pytest.raises(ValueError, match="min_seq_len must be an int >= 1, found 0"):
        ops.n_sample_sets(8, True, 0)
    with pytest.raises(ValueError, match="length must be an int >= 1, found 0"):
        ops.n_sample_sets(0, True, 8)


def arguments(backend: str, device: torch.device, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The op and valid small arguments in its arrays, some replaced."""
    values: dict[str, Any] = {
        "q": np.ones((2, 9, 3, 5), np.float32),
        "k": np.ones((2, 9, 3, 5), np.float32),
        "v": np.ones((2, 9, 3, 7), np.float32),
        "directions": np.ones((3, 4, 5), np.float32),
        "sample_ids": np.zeros((2, 1, 6, 3), np.int32),
        **changes,
    }
    arrays = {name: x for name, x in values.items() if isinstance(x, np.ndarray)}
    convert = to_jax if backend == "jax" else functools.partial(to_torch, device=device)
    ops = jax_ops if backend == "jax" else torch_ops
    return ops.hyper_attention, {**values, **{name: convert(x) for name, x in arrays.items()}}


def f32(*shape: int) -> NDArray[np.float32]:
    return np.ones(shape, np.float32)


@each_backend
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": f32(2, 9, 3)}, r"q must have 4 axes, found shape \(2, 9, 3\)"),
        ({"k": f32(2, 9, 2, 5)}, r"k must match q .* q \(2, 9, 3, 5\) and k \(2, 9, 2, 5\)"),
        ({"v": f32(2, 8, 3, 7)}, r"v must match k .* k \(2, 9, 3, 5\) and v \(2, 8, 3, 7\)"),
        ({"q": f32(2, 8, 3, 5), "is_causal": True}, "k must be as long as q when is_causal"),
        (
            {"directions": f32(2, 4, 5)},
            r"directions must be \[H, P, D\] of q .* \(2, 4, 5\) and q \(2, 9, 3, 5\)",
        ),
        ({"directions": f32(3, 31, 5)}, r"directions must hold 1 to 30 projections P, found \(3, 31, 5\)"),
        (
            {"sample_ids": np.zeros((2, 6, 3), np.int32)},
            r"sample_ids must have 4 axes, found shape \(2, 6, 3\)",
        ),
        (
            {"sample_ids": np.zeros((1, 1, 6, 3), np.int32)},
            r"with R = 1, found sample_ids \(1, 1, 6, 3\) and k",
        ),
        (
            {"sample_ids": np.zeros((2, 1, 6, 2), np.int32)},
            r"with R = 1, found sample_ids \(2, 1, 6, 2\) and k",
        ),
        (
            {"sample_ids": np.zeros((2, 2, 6, 3), np.int32)},
            r"with R = 1, found sample_ids \(2, 2, 6, 3\) and k",
        ),
        ({"is_causal": True, "min_seq_len": 3}, r"with R = 3, found sample_ids \(2, 1, 6, 3\) and k"),
        (
            {"sample_ids": np.full((2, 1, 6, 3), 9, np.int32)},
            r"sample_ids .* must lie in \[0, 9\), found 9 ... 9",
        ),
        (
            {"sample_ids": np.full((2, 1, 6, 3), -1, np.int32)},
            r"sample_ids .* must lie in \[0, 9\), found -1 ... -1",
        ),
        (
            {"sample_ids": np.full((2, 3, 6, 3), 3, np.int32), "is_causal": True, "min_seq_len": 3},
            r"sample_ids \(2, 2, 6, 3\) must lie in \[0, 3\), found 3 ... 3",
        ),
        (
            {"mask": np.ones((2, 8), bool)},
            r"mask must be \[B, S\] of k, found mask \(2, 8\) and k \(2, 9, 3, 5\)",
        ),
        ({"block_size": 0}, "block_size must be an int >= 1, found 0"),
        ({"min_seq_len": 0}, "min_seq_len must be an int >= 1, found 0"),
        ({"scale": float("nan")}, "scale must be finite, found nan"),
    ],
)
def test_value_errors(
    changes: dict[str, Any], message: str, backend: str, torch_device: torch.device
) -> None:
    attend, values = arguments(backend, torch_device, **changes)
    with pytest.raises(ValueError, match=message):
        attend(**values)


@each_backend
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": np.ones((2, 9, 3, 5), np.int32)}, "q must be one of"),
        ({"v": np.ones((2, 9, 3, 7), np.float16)}, "v must have the dtype of q"),
        ({"directions": np.ones((3, 4, 5), np.float16)}, "directions must have the dtype of q or float32"),
        ({"sample_ids": f32(2, 1, 6, 3)}, "sample_ids must be integers"),
        ({"sample_ids": [[[[0]]]]}, "sample_ids must be a"),
        ({"mask": np.ones((2, 9), np.int32)}, "mask must be boolean"),
        ({"block_size": 8.0}, "block_size must be an int >= 1, found 8.0"),
        ({"min_seq_len": True}, "min_seq_len must be an int >= 1, found True"),
        ({"scale": "1"}, "scale must be a Python number or None"),
    ],
)
def test_type_errors(changes: dict[str, Any], message: str, backend: str, torch_device: torch.device) -> None:
    attend, values = arguments(backend, torch_device, **changes)
    with pytest.raises(TypeError, match=message):
        attend(**values)


def test_a_sample_out_of_range_under_jit_gives_nan() -> None:
    attend, values = arguments("jax", torch.device("cpu"), sample_ids=np.full((2, 1, 6, 3), 9, np.int32))
    assert np.all(np.isnan(jax.jit(functools.partial(attend, block_size=4))(**values)))
