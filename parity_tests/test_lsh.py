"""Angular hashing: Gray codes, both backends against the oracle and each other, and its errors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from jax_vq.ops import lsh as jax_lsh
from parity_tests.support import DTYPES
from torch_ref.ops import lsh as torch_lsh
from vq_common import oracle
from vq_common.cases import round_to

Convert = Callable[[NDArray[Any], str], Any]
SIZES = ((2, 61, 3, 11, 7), (1, 1, 1, 5, 1), (3, 17, 2, 1, 4), (1, 13, 5, 7, 12))


@pytest.fixture(params=["jax", "torch"])
def backend(request: pytest.FixtureRequest, torch_device: torch.device) -> tuple[Any, Convert]:
    """The lsh module of a backend, and a conversion of NumPy arrays to its arrays of a named dtype."""
    if request.param == "jax":
        return jax_lsh, jnp.asarray
    return torch_lsh, lambda x, dtype: torch.tensor(x, dtype=getattr(torch, dtype), device=torch_device)


def numpy(x: Any) -> NDArray[Any]:
    return x.cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def inputs(size: tuple[int, ...], dtype: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Vectors and directions that `dtype` holds exactly, with no sign of a product under rounding."""
    batch, length, n_head, width, n_projection = size
    rng = np.random.default_rng(sum(size))
    x = round_to(rng.normal(size=(batch, length, n_head, width)), dtype)
    directions = round_to(rng.normal(size=(n_head, n_projection, width)), dtype)
    product = np.einsum("bthd,hpd->bthp", x, directions)
    size_of_terms = np.einsum("bthd,hpd->bthp", np.abs(x), np.abs(directions))
    eps = np.finfo(np.float64 if dtype == "float64" else np.float32).eps
    assert np.all(np.abs(product) > 2 * width * eps * size_of_terms)
    return x, directions


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_gray_rank_inverts_gray_code(backend: tuple[Any, Convert], dtype: str) -> None:
    lsh, array = backend
    index = np.arange(2**8 if dtype == "uint8" else 2**12)
    word = lsh.gray_code(array(index, dtype))
    assert word.dtype == array(index, dtype).dtype
    np.testing.assert_array_equal(numpy(word), [oracle.gray_code(int(i)) for i in index])
    np.testing.assert_array_equal(numpy(lsh.gray_rank(word)), index)


def test_neighbouring_words_differ_in_one_bit(backend: tuple[Any, Convert]) -> None:
    lsh, array = backend
    word = numpy(lsh.gray_code(array(np.arange(2**12), "int32")))
    assert set(np.bitwise_count(word[1:] ^ word[:-1])) == {1}
    assert sorted(word) == list(range(2**12))


@pytest.mark.parametrize("dtype, top", [("int32", 2**31 - 1), ("int64", 2**63 - 1)])
def test_gray_rank_of_the_widest_words(backend: tuple[Any, Convert], dtype: str, top: int) -> None:
    lsh, array = backend
    index = np.array([top, top - 1, top // 3, 0], dtype)
    np.testing.assert_array_equal(numpy(lsh.gray_rank(lsh.gray_code(array(index, dtype)))), index)


@pytest.mark.parametrize("name", ["gray_code", "gray_rank"])
@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_gray_code_takes_integers_only(backend: tuple[Any, Convert], name: str, dtype: str) -> None:
    lsh, array = backend
    with pytest.raises(TypeError, match=f"must be integers, found .*{dtype}"):
        getattr(lsh, name)(array(np.ones(3), dtype))


@pytest.mark.parametrize(
    "size, dtype", [(SIZES[0], dtype) for dtype in DTYPES] + [(size, "float32") for size in SIZES[1:]]
)
def test_angular_hash_equals_the_oracle(
    backend: tuple[Any, Convert], size: tuple[int, ...], dtype: str
) -> None:
    lsh, array = backend
    x, directions = inputs(size, dtype)
    bins = lsh.angular_hash(array(x, dtype), array(directions, dtype))
    assert bins.dtype == array(np.zeros(1), "int32").dtype
    np.testing.assert_array_equal(numpy(bins), oracle.angular_hash(x, directions))


def test_directions_may_stay_in_float32(backend: tuple[Any, Convert]) -> None:
    lsh, array = backend
    x = inputs(SIZES[0], "bfloat16")[0]
    directions = inputs(SIZES[0], "float32")[1]
    bins = lsh.angular_hash(array(x, "bfloat16"), array(directions, "float32"))
    np.testing.assert_array_equal(numpy(bins), oracle.angular_hash(x, directions))


def test_most_projections(backend: tuple[Any, Convert]) -> None:
    lsh, array = backend
    x, directions = inputs((2, 19, 3, 11, 30), "float32")
    bins = numpy(lsh.angular_hash(array(x, "float32"), array(directions, "float32"))).astype(np.int64)
    signs = np.einsum("bthd,hpd->bthp", x, directions) > 0
    np.testing.assert_array_equal(bins ^ (bins >> 1), (signs * 2 ** np.arange(30)).sum(-1))


def test_a_nan_stays_in_range_and_in_its_own_bin(backend: tuple[Any, Convert]) -> None:
    lsh, array = backend
    x, directions = inputs(SIZES[0], "float32")
    expected = oracle.angular_hash(x, directions)
    x[1, 3, 2, 0], expected[1, 3, 2] = np.nan, 0
    bins = lsh.angular_hash(array(x, "float32"), array(directions, "float32"))
    np.testing.assert_array_equal(numpy(bins), expected)


def test_angular_hash_under_jit() -> None:
    x, directions = (jnp.asarray(a, jnp.float32) for a in inputs(SIZES[0], "float32"))
    np.testing.assert_array_equal(
        jax.jit(jax_lsh.angular_hash)(x, directions), jax_lsh.angular_hash(x, directions)
    )


X, DIRECTIONS = (2, 5, 3, 7), (3, 4, 7)


@pytest.mark.parametrize(
    "x, directions, message",
    [
        (X[:3], DIRECTIONS, r"x must have 4 axes, found shape \(2, 5, 3\)"),
        (X, DIRECTIONS[1:], r"directions must have 3 axes, found shape \(4, 7\)"),
        (X, (2, 4, 7), r"directions must be \[H, P, D\] of x .* \(2, 4, 7\) and x \(2, 5, 3, 7\)"),
        (X, (3, 4, 6), r"directions must be \[H, P, D\] of x .* \(3, 4, 6\) and x \(2, 5, 3, 7\)"),
        (X, (3, 31, 7), r"directions must hold 1 to 30 projections P, found \(3, 31, 7\)"),
        (X, (3, 0, 7), r"directions must not be empty, found shape \(3, 0, 7\)"),
        ((2, 0, 3, 7), DIRECTIONS, r"x must not be empty, found shape \(2, 0, 3, 7\)"),
    ],
)
def test_shape_errors(
    backend: tuple[Any, Convert], x: tuple[int, ...], directions: tuple[int, ...], message: str
) -> None:
    lsh, array = backend
    with pytest.raises(ValueError, match=message):
        lsh.angular_hash(array(np.ones(x), "float32"), array(np.ones(directions), "float32"))


def test_type_and_value_errors(backend: tuple[Any, Convert]) -> None:
    lsh, array = backend
    x, directions = array(np.ones(X), "float32"), array(np.ones(DIRECTIONS), "float32")
    with pytest.raises(TypeError, match=r"x must be one of .*float64, .*found .*int32"):
        lsh.angular_hash(array(np.ones(X), "int32"), directions)
    with pytest.raises(TypeError, match=r"directions must have the dtype of x or float32, found .*bfloat16"):
        lsh.angular_hash(x, array(np.ones(DIRECTIONS), "bfloat16"))
    with pytest.raises(TypeError, match="directions must be a"):
        lsh.angular_hash(x, [[[1.0]]])
    bad = np.ones(DIRECTIONS)
    bad[1, 2, 3] = np.inf
    with pytest.raises(ValueError, match=r"directions \(3, 4, 7\) holds NaN or inf"):
        lsh.angular_hash(x, array(bad, "float32"))
