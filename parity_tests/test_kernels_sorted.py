"""Sums by code of sorted tokens, by Mosaic GPU: which shapes they take, and on a GPU what they give."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_vq
from jax_vq.kernels import hopper, hopper_sorted
from parity_tests.support import to_jax, to_numpy

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="kernels run there")


@pytest.mark.parametrize(
    "n_code, length, width, dtype, segment_len, is_usable",
    [
        (512, 16384, 128, "bfloat16", 2048, True),
        (384, 16384, 64, "bfloat16", 16384, True),
        (256, 16384, 128, "bfloat16", 2048, False),  # by products
        (512, 16384, 128, "bfloat16", 1920, False),
        (512, 1024, 128, "bfloat16", 2048, False),
        (640, 16384, 128, "bfloat16", 2048, False),
        (128, 16384, 512, "float32", 2112, True),
        (128, 16384, 128, "float32", 128, True),
        (128, 16384, 128, "float32", 64, False),
        (128, 16384, 192, "float32", 2112, False),
        (128, 16384, 32, "float32", 2112, False),
        (512, 16384, 128, "float16", 2048, False),
        (16, 16384, 128, "float32", 2048, False),
    ],
)
def test_shapes(
    n_code: int,
    length: int,
    width: int,
    dtype: str,
    segment_len: int,
    is_usable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopper, "is_usable", hopper.fits)
    vectors = jax.ShapeDtypeStruct((2, length, 3, width), dtype)
    assert hopper_sorted.is_usable(n_code, vectors, segment_len) == is_usable


@pytest.mark.parametrize(
    "segment_len, n_program, n_part",
    [(32768, 128, 1), (65536, 64, 2), (32896, 128, 2), (262144, 1, 128), (4096, 1, 2), (2048, 1, 1)],
)
def test_long_and_few_segments_are_cut(segment_len: int, n_program: int, n_part: int) -> None:
    assert hopper_sorted.parts_of_segment(segment_len, n_program, 2048) == n_part


def expected_sums(codes: Any, vectors: Any, n_code: int, segment_len: int) -> tuple[Any, Any]:
    """Of the tokens of each segment, in float64."""
    batch, length, n_head, width = vectors.shape
    n_segment = -(-length // segment_len)
    sums = np.zeros((batch, n_head, n_segment, n_code, width))
    numbers = np.zeros(sums.shape[:-1])
    for b, h, s in np.ndindex(numbers.shape[:3]):
        at = slice(s * segment_len, (s + 1) * segment_len)
        code, x = codes[b, at, h], vectors[b, at, h].astype(np.float64)
        for c in range(n_code):
            numbers[b, h, s, c] = np.sum(code == c)
            sums[b, h, s, c] = x[code == c].sum(axis=0)
        is_bad = ~np.isfinite(sums[b, h, s]).all(axis=0) | (code == -1).any()
        sums[b, h, s, :, is_bad] = np.nan
    return sums, numbers


@on_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "length, segment_len, n_code, width",
    [
        (136, 136, 384, 64),
        (1000, 384, 512, 128),
        (4096, 1024, 512, 64),
        (5000, 1984, 128, 512),
        (33000, 33000, 512, 64),  # in parts
    ],
)
@pytest.mark.parametrize("mean", [4, 2000])
def test_sums(dtype: str, length: int, segment_len: int, n_code: int, width: int, mean: int) -> None:
    """Whatever share of the tokens a code has; twice the same to the bit."""
    rng = np.random.default_rng(0)
    codes = (rng.geometric(1 / mean, (2, length, 3)) - 1).astype(np.int32)
    codes[codes > n_code + 5] %= n_code
    codes[0, length // 3, 1], codes[1, length - 1, 2] = -2, -1  # outside, and a key that is not finite
    vectors = rng.normal(size=(2, length, 3, width))
    vectors[0, length - 1, 0, 5], vectors[1, 0, 0, width - 1] = np.inf, np.nan
    arrays = jnp.asarray(codes), to_jax(vectors, dtype)
    call = jax.jit(lambda *x: hopper_sorted.segment_sums(*x, n_code, segment_len))
    sums, numbers = map(to_numpy, call(*arrays))
    with np.errstate(invalid="ignore"):
        expected = expected_sums(codes, to_numpy(arrays[1]), n_code, segment_len)
    np.testing.assert_array_equal(numbers, expected[1])
    scale = np.sqrt(np.maximum(numbers, 1))[..., None]
    np.testing.assert_allclose(sums / scale, expected[0] / scale, rtol=2e-6, atol=2e-5)
    for x, y in zip(call(*arrays), (sums, numbers), strict=True):
        np.testing.assert_array_equal(to_numpy(x), y)


@on_gpu
def test_calls_are_mapped() -> None:
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 384, (2, 1000, 3)), jnp.int32)
    vectors = to_jax(rng.normal(size=(2, 1000, 3, 64)), "bfloat16")
    together = hopper_sorted.segment_sums(codes, vectors, 384, 512)
    call = jax.jit(lambda *x: hopper_sorted.segment_sums(*(y[None] for y in x), 384, 512))
    for x, y in zip(jax.vmap(call)(codes, vectors), together, strict=True):
        np.testing.assert_array_equal(to_numpy(x[:, 0]), to_numpy(y))


@on_gpu
@pytest.mark.parametrize(
    "dtype, n_code, is_causal",
    [("float32", 128, False), ("bfloat16", 512, True), ("float32", 128, True), ("bfloat16", 512, False)],
)
def test_attention_is_that_with_other_sums(
    dtype: str, n_code: int, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a value that is not finite."""
    rng = np.random.default_rng(1)
    q, k, v = (to_jax(rng.normal(size=(2, 4096, 2, 128)), dtype) for _ in range(3))
    v = v.at[0, 7, 1, 3].set(np.inf)
    books = [to_jax(rng.normal(size=(2, n_code, 128)), "float32") for _ in range(2)]
    kernel, calls = hopper_sorted.segment_sums, []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return kernel(*arguments)

    def attend() -> Any:
        jax.clear_caches()
        return to_numpy(jax_vq.vq_attention(q, k, v, *books, is_causal=is_causal))

    with monkeypatch.context() as patch:
        patch.setattr(hopper_sorted, "is_usable", lambda *_: False)
        expected = attend()
    monkeypatch.setattr(hopper_sorted, "min_tokens", lambda dtype: 128)
    monkeypatch.setattr(hopper_sorted, "segment_sums", counted)
    found = attend()
    jax.clear_caches()
    assert calls
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-3)
