"""Codes, lookups, straight-through gradients and the commitment loss, in both backends."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_vq
import torch_ref
from jax_vq.ops.quantize import scores_by_terms
from parity_tests.support import DTYPES, assert_close, to_jax, to_numpy, to_torch
from vq_common import oracle
from vq_common.cases import Case, case_inputs, cases

PAIRS = ((jax_vq, to_jax), (torch_ref, to_torch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [c for c in cases("ci") if c.is_pure and not c.is_causal], ids=lambda c: c.name
)
def test_codes_match_oracle_and_twin(case: Case, dtype: str) -> None:
    """Identical wherever the two nearest codes are further apart than rounding."""
    inputs = case_inputs(case, dtype)
    x, codebook = inputs.k, inputs.codebook_k
    expected, gap = oracle.nearest_codes(x, codebook), oracle.code_gap(x, codebook)
    rounding = 1e-13 if dtype == "float64" else 1e-5
    clear = gap > rounding * np.maximum(1, (x**2).sum(-1))
    assert clear.mean() > 0.99
    for package, convert in PAIRS:
        codes = package.nearest_codes(convert(x, dtype), convert(codebook, dtype))
        assert str(codes.dtype).endswith("int32")
        assert tuple(codes.shape) == x.shape[:3]
        np.testing.assert_array_equal(to_numpy(codes)[clear], expected[clear])


def test_scores_by_terms_have_all_bits_of_the_codebook() -> None:
    """What a GPU computes in place of float32 products, to the rounding of a float32 sum."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 33, 3, 17)), jnp.bfloat16)
    codebook = jnp.asarray(rng.standard_normal((3, 21, 17)), jnp.float32)
    found = scores_by_terms(x, codebook)
    assert found.dtype == jnp.float32
    expected = np.einsum("bthd,hcd->bthc", to_numpy(x), to_numpy(codebook))
    assert np.abs(to_numpy(found) - expected).max() < 3e-6


@pytest.mark.parametrize("package, convert", PAIRS)
def test_ties_go_to_the_lowest_code(package: Any, convert: Any) -> None:
    codebook = np.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    x = np.array([[[[1.0, 0.0]], [[0.0, 2.0]], [[1.0, 1.0]], [[0.0, 0.0]]]])
    codes = to_numpy(package.nearest_codes(convert(x, "float32"), convert(codebook, "float32")))
    np.testing.assert_array_equal(codes[0, :, 0], [0, 1, 0, 0])


@pytest.mark.parametrize("package, convert", PAIRS)
def test_half_precision_input_with_a_float32_codebook(package: Any, convert: Any) -> None:
    """The codebook is not rounded to the type of x: codes that differ by less stay apart."""
    codebook = np.array([[[1.0], [1.001]]])
    x = convert(np.full((1, 3, 1, 1), 1.0078125), "bfloat16")
    np.testing.assert_array_equal(to_numpy(package.nearest_codes(x, convert(codebook, "float32"))), 1)


@pytest.mark.parametrize("package, convert", PAIRS)
def test_chunks_of_time(package: Any, convert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case_inputs(Case(name="code_chunks", q_len=101))
    jax.clear_caches()
    monkeypatch.setattr(f"{package.__name__}.ops.numerics.CHUNK_BYTES", 4096)
    codes = package.nearest_codes(convert(inputs.k), convert(inputs.codebook_k))
    np.testing.assert_array_equal(to_numpy(codes), oracle.nearest_codes(inputs.k, inputs.codebook_k))
    jax.clear_caches()


@pytest.mark.parametrize("package, convert", PAIRS)
def test_take_codes_and_its_gradient(package: Any, convert: Any) -> None:
    inputs = case_inputs(Case(name="take"))
    codes = oracle.nearest_codes(inputs.k, inputs.codebook_k)
    taken = package.take_codes(convert(inputs.codebook_k), convert(codes))
    np.testing.assert_array_equal(to_numpy(taken), oracle.take_codes(inputs.codebook_k, codes))


def test_take_codes_out_of_range_under_jit_is_nan() -> None:
    """Values cannot be checked there, and a clamped code would be silently wrong."""
    codebook = jnp.ones((1, 3, 2))
    codes = jnp.array([[[0], [3], [-1]]], jnp.int32)
    taken = jax.jit(jax_vq.take_codes)(codebook, codes)
    np.testing.assert_array_equal(np.isnan(to_numpy(taken))[0, :, 0, 0], [False, True, True])


def test_straight_through() -> None:
    """The value of the code, the gradient of the input."""
    inputs = case_inputs(Case(name="straight"))
    x, codes = inputs.k, oracle.nearest_codes(inputs.k, inputs.codebook_k)
    quantized = oracle.take_codes(inputs.codebook_k, codes)
    cotangent = np.random.default_rng(0).normal(size=x.shape)
    out, pull = jax.vjp(jax_vq.straight_through, to_jax(x), to_jax(quantized))
    d_x, d_quantized = pull(to_jax(cotangent))
    np.testing.assert_allclose(to_numpy(out), quantized, atol=1e-15)
    np.testing.assert_array_equal(to_numpy(d_x), cotangent)
    assert not to_numpy(d_quantized).any()
    leaves = [to_torch(a).requires_grad_() for a in (x, quantized)]
    torch_ref.straight_through(*leaves).backward(to_torch(cotangent))
    np.testing.assert_array_equal(to_numpy(leaves[0].grad), cotangent)
    assert leaves[1].grad is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_padded", [False, True])
def test_commitment_loss(dtype: str, is_padded: bool) -> None:
    inputs = case_inputs(Case(name="commitment", is_padded=is_padded), dtype)
    quantized = oracle.take_codes(inputs.codebook_k, oracle.nearest_codes(inputs.k, inputs.codebook_k))
    expected = oracle.commitment_loss(inputs.k, quantized, inputs.mask)
    for package, convert in PAIRS:
        loss = package.commitment_loss(
            convert(inputs.k, dtype), convert(quantized, dtype), mask=convert(inputs.mask)
        )
        assert_close(loss, np.asarray(expected), "float64" if dtype == "float64" else "float32")


def test_commitment_loss_pulls_the_input_alone() -> None:
    x, quantized = np.full((1, 2, 1, 2), 3.0), np.ones((1, 2, 1, 2))
    gradient = jax.grad(jax_vq.commitment_loss, (0, 1))(to_jax(x), to_jax(quantized))
    np.testing.assert_allclose(to_numpy(gradient[0]), 2.0)
    assert not to_numpy(gradient[1]).any()
    leaves = [to_torch(a).requires_grad_() for a in (x, quantized)]
    torch_ref.commitment_loss(*leaves).backward()
    np.testing.assert_allclose(to_numpy(leaves[0].grad), 2.0)
    assert leaves[1].grad is None


def test_commitment_loss_ignores_padding() -> None:
    x = np.ones((1, 3, 1, 2))
    x[0, 2] = np.nan
    mask = np.array([[True, True, False]])
    for package, convert in PAIRS:
        assert (
            float(package.commitment_loss(convert(x), convert(0 * np.ones_like(x)), mask=convert(mask))) == 2
        )
        nothing = convert(np.zeros((1, 3), bool))
        assert float(package.commitment_loss(convert(x), convert(np.ones_like(x)), mask=nothing)) == 0
    assert torch.is_grad_enabled()
