"""The ops that learn a codebook, `ema_update` and `kmeans`, against their definitions, in both backends."""

from typing import Any

import numpy as np
import pytest
import torch

import jax_vq
import torch_ref
from parity_tests.codebooks import (
    N_CODE,
    N_HEAD,
    WIDTH,
    Backend,
    assert_rows_are_among,
    backend_of,
    lloyd,
    objective,
    padding,
    vectors,
)
from parity_tests.support import DTYPES, assert_close, to_jax, to_numpy, to_torch
from vq_common import oracle
from vq_common.cases import round_to


@pytest.fixture(params=["jax", "torch"])
def backend(request: pytest.FixtureRequest, torch_device: torch.device) -> Backend:
    return backend_of(request.param, torch_device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "some", "all"])
def test_ema_update_follows_its_definition(backend: Backend, kind: str, dtype: str) -> None:
    """Four steps with dead codes; the state of half types is float32."""
    rng = np.random.default_rng(1)
    state_dtype = "float64" if dtype == "float64" else "float32"
    count = round_to(rng.uniform(0.2, 3.0, size=(N_HEAD, N_CODE)), state_dtype)
    total = round_to(rng.normal(size=(N_HEAD, N_CODE, WIDTH)), state_dtype)
    mask, settings = padding(kind), {"decay": 0.7, "threshold": 0.6}
    state, expected = backend.state(count, total, state_dtype), oracle.Ema(count, total)
    n_dead = 0
    for step in range(4):
        x, draws = vectors(step, dtype), round_to(rng.random((N_HEAD, N_CODE)), state_dtype)
        codes = rng.integers(N_CODE - 2, size=x.shape[:3])  # the last two codes die
        arguments = (
            backend.array(x, dtype),
            backend.array(codes.astype(np.int32)),
            backend.array(draws, state_dtype),
        )
        state = backend.ops.ema_update(state, *arguments, mask=backend.array(mask), **settings)
        expected = oracle.ema_update(*expected, x, codes, draws, mask=mask, **settings)
        n_dead += int((expected.count == 1).sum())
        assert str(state.count.dtype).endswith(state_dtype)
        assert_close(state.count, expected.count, state_dtype)
        assert_close(state.sum, expected.sum, state_dtype)
    assert (n_dead > 0) == (kind != "all")
    if kind == "all":
        np.testing.assert_array_equal(to_numpy(state.count), count)
        np.testing.assert_array_equal(to_numpy(state.sum), total)


def test_ema_update_never_takes_a_padded_vector(backend: Backend) -> None:
    """All codes are dead: all of them become real vectors, and NaN in a padded one stays out."""
    x, mask = vectors(), padding("some")
    assert mask is not None
    spoilt = np.where(mask[:, :, None, None], x, np.nan)
    draws = np.linspace(0, 1, N_HEAD * N_CODE, endpoint=False).reshape(N_HEAD, N_CODE)
    state = backend.state(np.zeros((N_HEAD, N_CODE)), np.zeros((N_HEAD, N_CODE, WIDTH)), "float32")
    codes = backend.array(np.zeros(x.shape[:3], np.int32))
    arguments = backend.array(spoilt, "float32"), codes, backend.array(draws, "float32")
    new = backend.ops.ema_update(state, *arguments, decay=1.0, threshold=0.1, mask=backend.array(mask))
    np.testing.assert_array_equal(to_numpy(new.count), 1)
    assert_rows_are_among(to_numpy(new.sum), round_to(x, "float32")[mask])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": (2, 5, 4, 5)}, r"state must be .*found sum \(3, 7, 5\) and x \(2, 5, 4, 5\)"),
        ({"codes": (2, 4, 3)}, r"codes must be .*\(2, 4, 3\) and x \(2, 5, 3, 5\)"),
        ({"draws": (3, 6)}, r"draws must be .*\(3, 6\) and count \(3, 7\)"),
        ({"mask": (2, 6)}, r"mask must be .*\(2, 6\) and x \(2, 5, 3, 5\)"),
        ({"decay": 1.5}, r"decay must lie in \[0, 1\], found 1.5"),
    ],
)
def test_ema_update_errors(backend: Backend, changes: dict[str, Any], message: str) -> None:
    sizes = {"x": (2, 5, 3, 5), "codes": (2, 5, 3), "draws": (3, 7), "mask": (2, 5)} | changes
    kinds = {"codes": np.int32, "mask": np.bool_}
    arrays = {
        name: backend.array(np.zeros(sizes[name], kinds.get(name, np.float64)), "float32")
        for name in ("x", "codes", "draws", "mask")
    }
    state = backend.state(np.ones((3, 7)), np.ones((3, 7, 5)), "float32")
    mask = arrays.pop("mask")
    with pytest.raises(ValueError, match=message):
        backend.ops.ema_update(state, **arrays, mask=mask, decay=changes.get("decay", 0.9))


@pytest.mark.float64
@pytest.mark.parametrize("kind", ["none", "some"])
def test_kmeans_is_lloyds_algorithm(backend: Backend, kind: str) -> None:
    x, mask = vectors(3), padding(kind)
    draws = np.random.default_rng(4).random((N_HEAD, N_CODE))
    objectives = []
    for n_iter in (0, 1, 2, 10):
        state = backend.ops.kmeans(
            backend.array(x, "float64"),
            backend.array(draws, "float64"),
            n_iter=n_iter,
            mask=backend.array(mask),
        )
        codebook = to_numpy(backend.ops.codebook_of(state))
        assert_close(codebook, lloyd(x, draws, n_iter, mask), "float64")
        objectives.append(objective(x, codebook, mask))
        if n_iter == 0:
            assert_rows_are_among(codebook, x.reshape(-1, N_HEAD, WIDTH) if mask is None else x[mask])
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] < objectives[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kmeans_in_other_types(backend: Backend, dtype: str) -> None:
    """The state is float32; half-type vectors are exact in it."""
    x, draws = vectors(3, dtype), round_to(np.random.default_rng(4).random((N_HEAD, N_CODE)), "float32")
    state = backend.ops.kmeans(backend.array(x, dtype), backend.array(draws, "float32"), n_iter=2)
    assert str(state.sum.dtype).endswith("float32")
    assert_close(backend.ops.codebook_of(state), lloyd(x, draws, 2, None), "float32")


@pytest.mark.float64
def test_kmeans_with_more_codes_than_vectors(backend: Backend) -> None:
    x, draws = vectors(6, batch=1, length=3), np.random.default_rng(7).random((N_HEAD, 11))
    state = backend.ops.kmeans(backend.array(x, "float64"), backend.array(draws, "float64"))
    assert to_numpy(state.count).min() == 1
    codebook = to_numpy(backend.ops.codebook_of(state))
    assert_rows_are_among(codebook, x[0])
    assert_close(codebook, lloyd(x, draws, 10, None), "float64")


@pytest.mark.float64
def test_kmeans_of_equal_vectors(backend: Backend) -> None:
    x = np.broadcast_to(vectors(8, batch=1, length=1), (2, 29, N_HEAD, WIDTH))
    state = backend.ops.kmeans(
        backend.array(x, "float64"), backend.array(np.zeros((N_HEAD, N_CODE)), "float64")
    )
    codebook = to_numpy(backend.ops.codebook_of(state))
    np.testing.assert_allclose(codebook, np.broadcast_to(x[0, 0, :, None], codebook.shape), rtol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nonfinite_vector_counts_as_padding(bad: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 12, 2, 3))
    mask = np.ones((1, 12), bool)
    mask[0, 5] = False
    dirty = x.copy()
    dirty[0, 5, 1, 2] = bad
    codes, draws = rng.integers(4, size=(1, 12, 2)), rng.random((2, 4))
    for package, convert in ((jax_vq, to_jax), (torch_ref, to_torch)):
        state = package.CodebookState(convert(np.ones((2, 4))), convert(rng.normal(size=(2, 4, 3))))
        arguments = convert(codes), convert(draws)
        found = package.ema_update(state, convert(dirty), *arguments, threshold=1.05)
        expected = package.ema_update(state, convert(x), *arguments, threshold=1.05, mask=convert(mask))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(to_numpy(a), to_numpy(b))
        fitted = package.codebook_of(package.kmeans(convert(dirty), convert(draws)))
        assert np.isfinite(to_numpy(fitted)).all()
