"""Attention over codes: oracle, twin, gradients, and what must hold whatever the values."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_vq
import torch_ref
from jax_vq.ops.vq_blocks import Form, Keys
from jax_vq.ops.vq_causal import Books, Queries, super_block_len
from parity_tests.support import (
    DTYPES,
    assert_close,
    assert_gradient_close,
    equations,
    to_jax,
    to_numpy,
    to_torch,
)
from parity_tests.vq_calls import BACKENDS, attend, differentiable, optional
from vq_common import vq_oracle
from vq_common.cases import Case, Inputs, case_inputs, cases
from vq_common.tolerances import relative_rms

# Every case runs in float64; rounding is tested in one or more of every form.
ROUNDED = (
    "small_full",
    "padded_causal",
    "odd_1000_causal",
    "prime_1021_full",
    "cross_padded",
    "keys_only_causal",
    "keys_only_padded_full",
    "window_7_13_sinks",
    "window_keys_only",
    "window_bias_local",
    "sinks",
    "segments_full",
    "segments_everything",
    "one_token_everything",
    "grouped_full",
    "one_key_head_causal",
    "grouped_window_segments",
)


def _runs(case: Case, dtype: str) -> bool:
    return dtype == "float64" or case.name in ROUNDED


def test_every_rounded_case_is_there() -> None:
    assert set(ROUNDED) <= {case.name for case in cases("ci")}


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(case, dtype, id=f"{case.name}-{dtype}")
        for case in cases("ci")
        for dtype in DTYPES
        if _runs(case, dtype)
    ],
)
def test_matches_oracle_and_twin(case: Case, dtype: str, torch_device: Any) -> None:
    inputs = case_inputs(case, dtype)
    options = case.options | optional(inputs)
    expected = vq_oracle.vq_attention(*inputs[:5], **options)
    if "gradient" not in case.tags:
        outs = [attend(backend, inputs, dtype, torch_device, **case.options) for backend in BACKENDS]
        for out in outs:
            assert_close(out, expected, dtype)
        assert_close(*outs, dtype, limits=2)
        return
    targets = vq_oracle.vq_attention_gradients(*inputs[:5], inputs.d_out, **options)
    outs = []
    for backend in BACKENDS:
        out, gradients = differentiable(backend, inputs, dtype, torch_device, **case.options)(inputs.d_out)
        outs.append(out)
        assert_close(out, expected, dtype)
        for name, found, target in zip(targets._fields, gradients, targets, strict=True):
            assert (found is None) == (target is None) == (getattr(inputs, name) is None), (backend, name)
            if target is not None:
                assert_gradient_close(found, target, dtype)
    assert_close(*outs, dtype, limits=2)


@pytest.mark.parametrize("length", [1, 2, 63, 1000, 1021])
@pytest.mark.parametrize("backend", BACKENDS)
def test_block_len_changes_nothing(backend: str, length: int) -> None:
    case = Case(name=f"blocks_{length}", batch=1, q_len=length, n_head=2, is_causal=True)
    inputs = case_inputs(case, "float32")
    expected = vq_oracle.vq_attention(*inputs[:5], is_causal=True)
    for block_len in (1, 7, 64, length, length + 5):
        out = attend(backend, inputs, "float32", is_causal=True, block_len=block_len)
        assert_close(out, expected, "float32")


@pytest.mark.parametrize("keys_only", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_chunks_equal_one(backend: str, keys_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The carried state and the shorter last chunk, at a size where one step would do."""
    case = Case(name="chunks", q_len=97, is_padded=True, is_causal=True, keys_only=keys_only)
    inputs = case_inputs(case)
    jax.clear_caches()
    for module in ("jax_vq", "torch_ref"):
        monkeypatch.setattr(f"{module}.ops.numerics.CHUNK_BYTES", 2**15)
    for is_causal in (False, True):
        out = attend(backend, inputs, "float64", is_causal=is_causal, block_len=8)
        expected = vq_oracle.vq_attention(*inputs[:5], is_causal=is_causal, mask=inputs.mask)
        assert_close(out, expected, "float64")
    jax.clear_caches()


@pytest.mark.parametrize("keys_only", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_changes_nothing(backend: str, keys_only: bool) -> None:
    """Any change at t, of any size, leaves every earlier output exactly as it was."""
    case = Case(name="causality", q_len=45, batch=1, keys_only=keys_only)
    inputs = case_inputs(case, "float32")
    before = attend(backend, inputs, "float32", is_causal=True, block_len=16)
    for t in (1, 15, 16, 17, 44):
        for value in (3.0, 1e4, np.inf, np.nan):
            changed = inputs._replace(q=inputs.q.copy(), k=inputs.k.copy(), v=inputs.v.copy())
            for x in (changed.q, changed.k, changed.v):
                x[:, t:] = value
            after = attend(backend, changed, "float32", is_causal=True, block_len=16)
            np.testing.assert_array_equal(after[:, :t], before[:, :t])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_inputs_reach_the_rows_that_attend_to_them(backend: str, is_causal: bool) -> None:
    case = Case(name="nonfinite", q_len=37, batch=2)
    inputs = case_inputs(case, "float32")
    clean = attend(backend, inputs, "float32", is_causal=is_causal, block_len=8)
    t, head = 13, 1
    for name, value in (("q", np.nan), ("k", np.inf), ("v", np.nan), ("v", -np.inf)):
        x = getattr(inputs, name).copy()
        x[1, t, head, 2] = value
        out = attend(backend, inputs._replace(**{name: x}), "float32", is_causal=is_causal, block_len=8)
        rows = np.zeros(out.shape, bool)
        attending = slice(t, t + 1) if name == "q" else slice(t if is_causal else 0, None)
        rows[1, attending, head, 2 if name == "v" else slice(None)] = True
        assert np.isnan(out[rows]).all()
        np.testing.assert_array_equal(out[~rows], clean[~rows])


@pytest.mark.parametrize("name", ["q", "q_local"])
def test_a_query_that_is_not_finite_has_no_gradient(name: str) -> None:
    """Nor have what it sees: NaN in the same places in both backends."""
    inputs = case_inputs(Case(name="nonfinite", q_len=37, batch=2, has_local=True), "float32")
    x = getattr(inputs, name).copy()
    x[1, 13, 1, 2] = np.inf
    options = {"is_causal": True, "block_len": 8, "mem_len": 8}
    both = [
        differentiable(backend, inputs._replace(**{name: x}), "float32", **options)(inputs.d_out)
        for backend in BACKENDS
    ]
    for out, gradients in both:
        assert np.isnan(out[1, 13, 1]).all()
        assert np.isnan(gradients.v[1, 8:14, 1 // (inputs.q.shape[2] // inputs.v.shape[2])]).all()
        assert np.isfinite(gradients.v[0]).all()
    (_, found), (_, expected) = both
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            np.testing.assert_array_equal(np.isnan(one), np.isnan(other))


def test_a_query_that_is_not_finite_has_no_output_in_optimized_code() -> None:
    """Compiled with the flags that users have: XLA's exponential for a CPU need not keep a constant NaN."""
    program = """
import jax.numpy as jnp, numpy as np
from jax_vq import vq_attention
x = np.random.default_rng(0).normal(size=(1, 37, 2, 16)).astype("float32")
q, q_local, book = x.copy(), abs(x), jnp.asarray(x[0, :19].swapaxes(0, 1))
q[0, 13, 1, 2], q_local[0, 13, 1, 2] = np.nan, np.inf  # which every key of -1 scores with -inf
for name, arrays in {"codes": (q, x, x, book, book), "local": (x, x, x, book, book)}.items():
    options = {} if name == "codes" else {"q_local": q_local, "k_local": -abs(x), "mem_len": 8}
    out = vq_attention(*map(jnp.asarray, arrays), is_causal=True, **options)
    print(name, np.argwhere(np.isnan(out).any(-1)).tolist(), np.isnan(out).sum())
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.stdout.splitlines() == ["codes [[0, 13, 1]] 16", "local [[0, 13, 1]] 16"], run.stderr


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_keys_change_nothing(backend: str, is_causal: bool) -> None:
    case = Case(name="padding", q_len=41, batch=3, is_padded=True)
    inputs = case_inputs(case, "float32")
    assert inputs.mask is not None
    assert not inputs.mask[1].any()
    clean = attend(backend, inputs, "float32", is_causal=is_causal)
    k, v = inputs.k.copy(), inputs.v.copy()
    k[~inputs.mask], v[~inputs.mask] = np.nan, np.inf
    np.testing.assert_array_equal(
        attend(backend, inputs._replace(k=k, v=v), "float32", is_causal=is_causal), clean
    )
    assert np.all(clean[1] == 0)
    if is_causal:
        assert np.all(clean[0, : inputs.mask[0].argmax()] == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_may_come_in_any_order(backend: str) -> None:
    case = Case(name="permutation", q_len=19, k_len=53, batch=1)
    inputs = case_inputs(case)
    order = np.random.default_rng(0).permutation(53)
    permuted = inputs._replace(k=inputs.k[:, order], v=inputs.v[:, order])
    assert_close(attend(backend, permuted, "float64"), attend(backend, inputs, "float64"), "float64")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_scores(backend: str, is_causal: bool, dtype: str) -> None:
    """Scores of +-1e4, and codes of huge score that come up first at the very end."""
    rng = np.random.default_rng(0)
    length = 40
    codebook = np.array([[[-100.0, 0.0], [100.0, 0.0], [0.0, 1.0]]])
    picked = np.r_[rng.integers(0, 2, length - 1) * 2, 1]
    q = codebook[0, rng.integers(0, 3, length)][None, :, None]
    k = codebook[0, picked][None, :, None]
    inputs = Inputs(q, k, rng.normal(size=(1, length, 1, 3)), codebook, codebook, None, np.zeros(1))
    score = np.einsum("bthd,bshd->bhts", q, k)
    assert score.max() == 1e4
    assert score.min() == -1e4
    out = attend(backend, inputs, dtype, is_causal=is_causal, scale=1.0, block_len=16)
    assert_close(out, vq_oracle.vq_attention(*inputs[:5], is_causal=is_causal, scale=1.0), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_keys_on_one_code(backend: str) -> None:
    """Equal keys weigh equally: outputs are running means."""
    case = Case(name="one_key_code", q_len=50, batch=1)
    inputs = case_inputs(case)
    inputs = inputs._replace(k=np.broadcast_to(inputs.codebook_k[:, 3], inputs.k.shape).copy())
    out = attend(backend, inputs, "float64", is_causal=True, block_len=8)
    mean = np.cumsum(inputs.v, axis=1) / np.arange(1, 51)[None, :, None, None]
    assert_close(out, mean, "float64")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_million_equal_tokens_in_bfloat16(backend: str, is_causal: bool) -> None:
    """Sums would reach 1e6 x 0.33: means neither overflow nor lose precision."""
    length = 1_000_000
    value = 0.333984375
    dtype = "bfloat16"
    package, convert = {"jax": (jax_vq, to_jax), "torch": (torch_ref, to_torch)}[backend]
    x, v = np.ones((1, length, 1, 4), np.float32), np.full((1, length, 1, 3), value, np.float32)
    codebook = convert(np.array([[[1.0] * 4, [-1.0] * 4]]), dtype)
    out = package.vq_attention(
        *(convert(a, dtype) for a in (x, x, v)), codebook, codebook, is_causal=is_causal
    )
    assert_close(out, np.full(v.shape, value), dtype)
    assert abs(to_numpy(out) / value - 1).max() < 2**-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_sums_over_a_long_sequence(backend: str) -> None:
    """Means over 200,000 varied tokens stay within float32 rounding of the exact ones."""
    rng = np.random.default_rng(0)
    length = 200_000
    v = (rng.normal(size=(1, length, 1, 2)) + 10).astype(np.float32)
    codebook = np.ones((1, 1, 2))
    inputs = Inputs(np.ones((1, length, 1, 2)), np.ones((1, length, 1, 2)), v, codebook, codebook, None, v)
    for is_causal in (False, True):
        out = attend(backend, inputs, "float32", is_causal=is_causal)
        mean = np.cumsum(v.astype(np.float64), axis=1) / np.arange(1, length + 1)[None, :, None, None]
        expected = mean if is_causal else np.broadcast_to(mean[:, -1:], v.shape)
        assert relative_rms(out, expected) <= 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_are_not_trained(backend: str) -> None:
    """Codebooks are moving averages: their gradient is zero or absent."""
    inputs = case_inputs(Case(name="codebooks", q_len=9))
    if backend == "torch":
        arrays = [to_torch(x).requires_grad_() for x in inputs[:5]]
        torch_ref.vq_attention(*arrays).sum().backward()
        assert arrays[3].grad is None
        assert arrays[4].grad is None
        assert arrays[2].grad is not None
        return
    arrays = [to_jax(x) for x in inputs[:5]]
    gradients = jax.grad(lambda *a: jnp.sum(jax_vq.vq_attention(*a)), argnums=(2, 3, 4))(*arrays)
    assert float(jnp.abs(gradients[0]).max()) > 0
    assert all(float(jnp.abs(g).max()) == 0 for g in gradients[1:])


def test_one_scan_over_super_blocks() -> None:
    """Beside those that find codes there is one scan, whose number of steps follows from the shapes.

    On a GPU, where chunks are larger, the codes of this length are found without one.
    """
    length, n_head, width, n_code, block_len = 2**15, 4, 64, 128, 128
    x = jax.ShapeDtypeStruct((1, length, n_head, width), jnp.float32)
    book = jax.ShapeDtypeStruct((n_head, n_code, width), jnp.float32)
    codes = jax.ShapeDtypeStruct((1, length, n_head), jnp.int32)
    options: dict[str, Any] = {"is_causal": True, "block_len": block_len, "implementation": "xla"}
    traced = jax.make_jaxpr(lambda *a: jax_vq.vq_attention(*a, **options))
    scans = equations(traced(x, x, x, book, book).jaxpr, "scan")
    step = super_block_len(
        Queries(None, codes, None),
        Keys(codes, x, None, None),
        Books(book, book, None, None, 1.0),
        Form(1.0, part_len=block_len),
    )
    assert step % block_len == 0
    assert block_len < step < length
    assert len(scans) == (1 if jax.default_backend() == "gpu" else 3)
    assert [scan.params["length"] for scan in scans].count(length // step) == 1


def test_torch_backward_of_a_view_and_inference_mode() -> None:
    """Inputs that are transposed views, and no_grad, give the same output."""
    inputs = case_inputs(Case(name="views", q_len=15, is_causal=True))
    arrays = [to_torch(x) for x in inputs[:5]]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arrays[:3]]
    plain = torch_ref.vq_attention(*arrays, is_causal=True)
    with torch.inference_mode():
        again = torch_ref.vq_attention(*views, *arrays[3:], is_causal=True)
    assert torch.equal(plain, again)
