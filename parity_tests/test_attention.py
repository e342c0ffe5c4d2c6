"""Exact attention, its log-sum-exp and the merge of partial attentions."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_vq
import torch_ref
from parity_tests.support import (
    DTYPES,
    assert_close,
    assert_gradient_close,
    forward_and_gradients_jax,
    forward_and_gradients_torch,
    to_jax,
    to_numpy,
    to_torch,
)
from vq_common import oracle
from vq_common.cases import Case, case_inputs, cases


def _names(case: Case) -> str:
    return case.name


def is_plain(case: Case) -> bool:
    """Whether a case says anything about exact attention that another does not."""
    return case.is_pure and not case.keys_only


@pytest.mark.standard_promotion  # the framework's backward pass mixes types
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in cases("gradient") if is_plain(c)], ids=_names)
def test_matches_oracle_and_twin(case: Case, dtype: str, torch_device: Any) -> None:
    inputs = case_inputs(case, dtype)
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    expected = oracle.dot_product_attention(q, k, v, is_causal=case.is_causal, mask=mask)
    weight = oracle.visible(case.q_len, case.length, is_causal=case.is_causal, mask=mask)
    gradients = oracle.softmax_attention_gradients(q, k, v, weight, case.d_k**-0.5, inputs.d_out)

    def jax_op(*qkv: Any) -> Any:
        return jax_vq.dot_product_attention(*qkv, is_causal=case.is_causal, mask=to_jax(mask))

    def torch_op(*qkv: Any) -> Any:
        on_device = to_torch(mask, device=torch_device)
        return torch_ref.dot_product_attention(*qkv, is_causal=case.is_causal, mask=on_device)

    ours_jax = forward_and_gradients_jax(
        jax_op, tuple(to_jax(x, dtype) for x in (q, k, v)), to_jax(inputs.d_out, dtype)
    )
    ours_torch = forward_and_gradients_torch(
        torch_op,
        tuple(to_torch(x, dtype, torch_device) for x in (q, k, v)),
        to_torch(inputs.d_out, dtype, torch_device),
    )
    for out, found in (ours_jax, ours_torch):
        assert_close(out, expected.out, dtype)
        for gradient, name in zip(found, gradients._fields, strict=True):
            assert_gradient_close(gradient, getattr(gradients, name), dtype)
    assert_close(ours_jax[0], ours_torch[0], dtype, limits=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in cases("ci") if is_plain(c)], ids=_names)
def test_log_sum_exp(case: Case, dtype: str, torch_device: Any) -> None:
    inputs = case_inputs(case, dtype)
    arrays = inputs.q, inputs.k, inputs.v
    expected = oracle.dot_product_attention(*arrays, is_causal=case.is_causal, mask=inputs.mask)
    options = {"is_causal": case.is_causal, "return_lse": True}
    results = (
        jax_vq.dot_product_attention(
            *(to_jax(x, dtype) for x in arrays), mask=to_jax(inputs.mask), **options
        ),
        torch_ref.dot_product_attention(
            *(to_torch(x, dtype, torch_device) for x in arrays),
            mask=to_torch(inputs.mask, device=torch_device),
            **options,
        ),
    )
    finite = np.isfinite(expected.lse)
    for out, lse in results:
        assert_close(out, expected.out, dtype)
        lse = to_numpy(lse)
        np.testing.assert_array_equal(np.isfinite(lse), finite)
        assert np.all(np.isneginf(lse[~finite]))
        # Accumulated in float32 at least, from inputs that are exact.
        assert_close(lse[finite], expected.lse[finite], "float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize("is_causal", [False, True])
def test_log_sum_exp_over_several_chunks(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of queries, a last one shorter, give the same outputs and gradients as one."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 53, 3, 5)) for _ in range(3))
    d_out = rng.normal(size=v.shape)
    for module in ("jax_vq", "torch_ref"):
        monkeypatch.setattr(f"{module}.ops.numerics.CHUNK_BYTES", 4 * 2 * 3 * 53 * 17)
    weight = oracle.visible(53, 53, is_causal=is_causal)
    expected = oracle.softmax_attention(q, k, v, weight, 5**-0.5)
    gradients = oracle.softmax_attention_gradients(q, k, v, weight, 5**-0.5, d_out)

    def jax_op(*qkv: Any) -> Any:
        return jax_vq.dot_product_attention(*qkv, is_causal=is_causal, return_lse=True)[0]

    def torch_op(*qkv: Any) -> Any:
        return torch_ref.dot_product_attention(*qkv, is_causal=is_causal, return_lse=True)[0]

    for out, found in (
        forward_and_gradients_jax(jax_op, tuple(to_jax(x) for x in (q, k, v)), to_jax(d_out)),
        forward_and_gradients_torch(torch_op, tuple(to_torch(x) for x in (q, k, v)), to_torch(d_out)),
    ):
        assert_close(out, expected.out, "float64")
        for gradient, reference in zip(found, gradients, strict=True):
            assert_close(gradient, reference, "float64", "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_of_two_parts_is_the_whole(dtype: str, torch_device: Any) -> None:
    case = Case(name="merge", q_len=7, k_len=31)
    inputs = case_inputs(case, dtype)
    q, k, v = inputs.q, inputs.k, inputs.v
    cut = 12
    whole = oracle.dot_product_attention(q, k, v)
    first, second = (oracle.dot_product_attention(q, k[:, s], v[:, s]) for s in (np.s_[:cut], np.s_[cut:]))
    merged = oracle.merge_attention(first, second)
    assert_close(merged.out, whole.out, "float64")
    for package, convert in ((jax_vq, to_jax), (torch_ref, lambda x, t: to_torch(x, t, torch_device))):
        parts = [
            package.dot_product_attention(
                *(convert(x, dtype) for x in (q, k[:, s], v[:, s])), return_lse=True
            )
            for s in (np.s_[:cut], np.s_[cut:])
        ]
        out, lse = package.merge_attention(*parts[0], *parts[1])
        assert_close(out, whole.out, dtype)
        assert_close(lse, whole.lse, "float64" if dtype == "float64" else "float32")


def test_merge_with_a_part_that_saw_nothing() -> None:
    rng = np.random.default_rng(0)
    out1, out2 = rng.normal(size=(2, 1, 2, 1, 3))
    lse1, lse2 = np.array([[[1.0], [-np.inf]]]), np.full((1, 2, 1), -np.inf)
    for package, convert in ((jax_vq, to_jax), (torch_ref, to_torch)):
        out, lse = package.merge_attention(*(convert(x) for x in (out1, lse1, out2, lse2)))
        np.testing.assert_allclose(to_numpy(out)[0, 0], out1[0, 0])
        assert np.all(to_numpy(out)[0, 1] == 0)
        assert to_numpy(lse)[0, 0, 0] == 1.0
        assert np.isneginf(to_numpy(lse)[0, 1, 0])


@pytest.mark.parametrize("return_lse", [False, True])
def test_nonfinite_values_stay_where_they_are_seen(return_lse: bool) -> None:
    """A later key, a padded key: neither reaches a row that does not attend to it."""
    rng = np.random.default_rng(0)
    clean = [rng.normal(size=(1, 23, 2, 5)) for _ in range(3)]
    mask = np.ones((1, 23), bool)
    mask[0, 20:] = False
    for package, convert in ((jax_vq, to_jax), (torch_ref, to_torch)):

        def run(arrays: Any, p: Any = package, c: Any = convert, **options: Any) -> np.ndarray:
            found = p.dot_product_attention(
                *(c(x, "float32") for x in arrays), return_lse=return_lse, **options
            )
            return to_numpy(found[0] if return_lse else found)

        for which in (1, 2):
            dirty = [x.copy() for x in clean]
            dirty[which][0, 11, 1] = np.nan
            before, after = run(clean, is_causal=True), run(dirty, is_causal=True)
            np.testing.assert_array_equal(after[:, :11], before[:, :11])
            np.testing.assert_array_equal(after[:, :, 0], before[:, :, 0])
            assert np.isnan(after[:, 11:, 1]).all()
            dirty = [x.copy() for x in clean]
            dirty[which][0, 21] = np.inf
            np.testing.assert_array_equal(run(dirty, mask=convert(mask)), run(clean, mask=convert(mask)))


@pytest.mark.gpu("jax")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_types_run_on_cudnn(dtype: Any) -> None:
    x = jnp.ones((1, 256, 2, 64), dtype)
    from jax_vq.ops.attention import exact_implementation

    assert exact_implementation(x, x) == "cudnn"
    assert bool(jnp.isfinite(jax_vq.dot_product_attention(x, x, x, is_causal=True)).all())


def test_framework_kernel_is_used_without_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **options: Any) -> Any:
        called.append(args[0].shape)
        return original(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    x = torch.ones(1, 4, 2, 8)
    torch_ref.dot_product_attention(x, x, x)
    assert called == [(1, 2, 4, 8)]


def test_float16() -> None:
    """Taken on every platform, also where the framework's kernel does not."""
    case = Case(name="float16", q_len=33, is_causal=True)
    inputs = case_inputs(case, "float16")
    arrays = inputs.q, inputs.k, inputs.v
    expected = oracle.dot_product_attention(*arrays, is_causal=True).out
    for package, convert in ((jax_vq, to_jax), (torch_ref, to_torch)):
        out = package.dot_product_attention(*(convert(x, "float16") for x in arrays), is_causal=True)
        assert_close(out, expected, "bfloat16")
